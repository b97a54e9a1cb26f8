"""How far this process has come, for whoever watches it: it may live, give signs of life, and stand still all the same."""

from __future__ import annotations

_chunks = 0


def begin() -> None:
    """Nothing has been computed yet."""
    global _chunks
    _chunks = 0


def note() -> None:
    """Another chunk of tasks has been computed."""
    global _chunks
    _chunks += 1


def chunks() -> int:
    """Computed since the beginning."""
    return _chunks
