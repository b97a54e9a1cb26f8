"""What the C library does with memory that tensors no longer need."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Keep freed blocks up to 1 GiB for the next tensor, where the C library is glibc; elsewhere False, and nothing changes.

    By default glibc hands blocks of some hundred kilobytes back to the system as soon as they are free, and gets them again for
    the next tensor page by page, zeroed: a meta-step spends up to a tenth of its time there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _BYTES)) and bool(mallopt(_MMAP_THRESHOLD, _BYTES))
