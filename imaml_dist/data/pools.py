"""Class pools: for a window of meta-steps all episodes come from a few classes, which a node's cache can hold.

Window w = step // steps draws its pool by the stream (seed, CLASS_POOL, w, 0, ordinal 1), uniformly over the classes of
the split and without replacement; ordinal 0 of the same place shuffles Omniglot's split. An episode then draws its
classes from the pool as it otherwise does from all, so that over all windows every set of classes is as likely as
without pools; within one window they recur.
"""

from __future__ import annotations

from functools import lru_cache

from imaml_dist.data.philox import Domain, Stream

POOL = 1
"""Sub-stream of (seed, CLASS_POOL, w, 0) from which the pool of window w follows."""

_KEPT = 8
"""Windows whose pools are remembered: the current one, those read ahead, those of other callers."""


class ClassPools:
    """The pool of every window, a pure function of (seed, window). Safe to use from several threads.

    Args:
        seed: of all draws.
        classes: C, in the split.
        size: P <= C, classes in a pool.
        steps: meta-steps in a window, >= 1.
    """

    def __init__(self, seed: int, classes: int, size: int, steps: int) -> None:
        self._steps = steps

        @lru_cache(maxsize=_KEPT)
        def drawn(window: int) -> tuple[int, ...]:
            return tuple(Stream(seed, Domain.CLASS_POOL, window, 0, ordinal=POOL).sample(classes, size))

        self._drawn = drawn

    def at(self, step: int) -> tuple[int, ...]:
        """Class ids of the pool of meta-step `step`, in drawn order."""
        return self._drawn(step // self._steps)
