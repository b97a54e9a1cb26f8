"""The unit of storage: one class with all of its images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class ClassRecord:
    """One class, ready to be written as one sample of a shard.

    Attributes:
        key: unique in its split; letters, digits, `_`, `-`, `@` and `/` only. The canonical class id is the rank of
            the key in bytewise order.
        images: uint8 `[n, H, W, C]`; ink on background: 255 is full ink, 0 is empty.
        name: for people.
        sources: where each image came from, n strings (archive member, font name), for audits.
    """

    key: str
    images: Images
    name: str = ""
    sources: tuple[str, ...] = field(default=())
