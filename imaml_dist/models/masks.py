"""Dropout masks as a pure function of a task's key: the same wherever, whenever and beside whatever a task is computed.

Bits come from splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), in wrapping int64
arithmetic: the same on every device, and vectorised over tasks where a generator's state could not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTOR_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_FACTOR_2 = 0x94D049BB133111EB - (1 << 64)


def derived_key(key: Tensor, number: int) -> Tensor:
    """One of many keys that follow from a key; int64 of any shape."""
    return _mixed(_mixed(key + _GOLDEN) + _wrapped(number * _GOLDEN))


def keep_mask(key: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Bool of `shape`, each entry false with probability `p` (to 2^-24), and independent of the others.

    Args:
        key: int64, no axes.
        shape: of the mask.
        p: in [0, 1].
    """
    count = 1
    for size in shape:
        count *= size
    numbers = torch.arange(1, count + 1, device=key.device)
    bits = _mixed(key + numbers * _GOLDEN)
    return (_shifted(bits, 40) >= round(p * (1 << 24))).reshape(tuple(shape))


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FACTOR_1
    z = (z ^ _shifted(z, 27)) * _FACTOR_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _wrapped(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
