"""Counter-based random draws: what is drawn depends on (seed, domain, step, task) and on nothing else.

Philox4x64-10 with key `[seed, domain]` and counter `[0, ordinal, step, task]`. Only the generator's raw 64-bit words
are used, whose values NumPy guarantees for ever; its sampling methods carry no such promise. The rules below are the
project's own and are frozen under `SPEC_VERSION`.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Lemire, "Fast random integer generation
in an interval" (2019).
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPEC_VERSION = 1
"""Of the drawing rules; a run is resumed and a frozen manifest is read only under the version it was made with."""

_WORD = 1 << 64
_LOW = _WORD - 1
_BLOCK = 4
"""Words that one value of the counter gives."""


class Domain(IntEnum):
    """What a stream is for, so that streams never overlap."""

    TRAIN = 0
    VAL = 1
    TEST = 2
    CLASS_POOL = 3
    AUGMENTATION = 16


class _OfThread(threading.local):
    """A generator that is set to a place before every use: to make a new one takes ten times as long."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_generator = _OfThread()


def raw_words(
    seed: int, domain: int, step: int, task: int, ordinal: int, count: int, block: int = 0
) -> NDArray[np.uint64]:
    """`count` words of a stream from word `4 * block` on; see `Stream` for the other arguments."""
    philox = _generator.philox
    state: Any = {  # of plain integers, which are faster to make than arrays
        "bit_generator": "Philox",
        "state": {"counter": (block, ordinal, step, task), "key": (seed, domain)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": _BLOCK,  # nothing of it is left
        "has_uint32": 0,
        "uinteger": 0,
    }
    philox.state = state
    return philox.random_raw(count)


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
        self._place = (seed, domain, step, task, ordinal)
        self._words: list[int] = []
        self._block, self._blocks = 0, 1

    def u64(self) -> int:
        """The next raw word, 0 <= word < 2^64."""
        if not self._words:
            self._words = raw_words(*self._place, _BLOCK * self._blocks, self._block).tolist()[::-1]
            # One word or very many may be wanted: each time a little more is made ahead.
            self._block, self._blocks = self._block + self._blocks, min(2 * self._blocks + 6, 64)
        return self._words.pop()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), n >= 1, without bias (Lemire's multiply and reject)."""
        while True:
            product = self.u64() * n
            low = product & _LOW
            # The threshold is below n, so that its slow division is hardly ever needed.
            if low >= n or low >= (_WORD - n) % n:
                return product >> 64

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
