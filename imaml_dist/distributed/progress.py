"""How far this process has come, for whoever watches it: it may live, give signs of life, and stand still all the same.

Only computing is watched. Waiting for others, for storage or for data has limits of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_begun = _ended = 0


@contextmanager
def computing() -> Iterator[None]:
    """A chunk of tasks is computed."""
    global _begun, _ended
    _begun += 1
    try:
        yield
    finally:
        _ended = _begun


def chunk() -> int:
    """The number of the chunk that is being computed, in this process; 0 if none is."""
    return _begun if _begun > _ended else 0
