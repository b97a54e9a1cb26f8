"""The unit of storage: one class with all of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class ClassRecord:
    """One class, ready to be written as one sample of a shard.

    Attributes:
        key: unique in its split; letters, digits, `_`, `-`, `@` and `/` only. The canonical class id is the rank of
            the key in bytewise order.
        images: uint8 `[n, H, W, C]`; drawings are ink on background (255 is full ink), photographs as they are.
        name: for people.
        sources: where each image came from, n strings (archive member, font name), for audits.
        skipped: images that could not be read and were left out, a sentence each.
    """

    key: str
    images: Images
    name: str = ""
    sources: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the images."""
        return self.images.shape

    @property
    def digest(self) -> str:
        """Of what the images are made from: not known, the provenance has it."""
        return ""

    @property
    def may_skip(self) -> bool:
        """Whether images were left out."""
        return bool(self.skipped)

    def load(self) -> ClassRecord:
        """Itself; see `LazyRecord`."""
        return self


@dataclass(frozen=True)
class LazyRecord:
    """One class whose images are made when they are written.

    Attributes:
        key: see `ClassRecord`.
        shape: of the images, `(n, H, W, C)`; the record may turn out to have fewer than n.
        load: makes the record.
        digest: changes whenever what the images are made from does.
        may_skip: images that cannot be read may be left out.
    """

    key: str
    shape: tuple[int, ...]
    load: Callable[[], ClassRecord]
    digest: str = ""
    may_skip: bool = False


AnyRecord = ClassRecord | LazyRecord
