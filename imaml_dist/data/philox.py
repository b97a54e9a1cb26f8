"""Counter-based random draws: what is drawn depends on (seed, domain, step, task) and on nothing else.

Philox4x64-10 with key `[seed, domain]` and counter `[0, ordinal, step, task]`. Only the generator's raw 64-bit words
are used, whose values NumPy guarantees for ever; its sampling methods carry no such promise. The rules below are the
project's own and are frozen under `SPEC_VERSION`.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Lemire, "Fast random integer generation
in an interval" (2019).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

SPEC_VERSION = 1
"""Of the drawing rules; a run is resumed and a frozen manifest is read only under the version it was made with."""

_WORD = 1 << 64
_BUFFER = 64


class Domain(IntEnum):
    """What a stream is for, so that streams never overlap."""

    TRAIN = 0
    VAL = 1
    TEST = 2
    CLASS_POOL = 3
    AUGMENTATION = 16


class Stream:
    """The words of one (seed, domain, step, task), in order.

    Args:
        seed: 0 <= seed < 2^64.
        domain: what the stream is for.
        step: meta-step, >= 0.
        task: number of the task within the step, >= 0.
        ordinal: sub-stream; 0 is the episode itself.
    """

    def __init__(self, seed: int, domain: int, step: int, task: int, ordinal: int = 0) -> None:
        self._generator = np.random.Philox(
            key=np.array([seed, domain], dtype=np.uint64), counter=np.array([0, ordinal, step, task], dtype=np.uint64)
        )
        self._words: list[int] = []

    def u64(self) -> int:
        """The next raw word, 0 <= word < 2^64."""
        if not self._words:
            self._words = self._generator.random_raw(_BUFFER).tolist()[::-1]
        return self._words.pop()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), n >= 1, without bias (Lemire's multiply and reject)."""
        threshold = (_WORD - n) % n
        while True:
            product = self.u64() * n
            if product % _WORD >= threshold:
                return product // _WORD

    def sample(self, n: int, k: int) -> list[int]:
        """k distinct integers out of [0, n) in the order drawn: a sparse Fisher-Yates shuffle, O(k).

        Raises:
            ValueError: k > n.
        """
        if k > n:
            raise ValueError(f"cannot draw {k} distinct integers out of {n}")
        moved: dict[int, int] = {}
        drawn = []
        for i in range(k):
            j = i + self.below(n - i)
            drawn.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return drawn
