"""How fast every rank has been, and the deal of chunks that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from imaml_dist.distributed.chunks import Deal, deal_by_speed, duration, even_deal

GAIN = 0.9
"""Another deal is made if a step is expected to take less than this part of what it takes now: not for the noise of a machine."""


class Speeds:
    """Times of all ranks since the last deal, the same on every rank.

    Args:
        world: number of ranks.
        chunks: of a meta-step.

    Attributes:
        deal: the one there is; even until times are known.
    """

    def __init__(self, world: int, chunks: int) -> None:
        self.deal: Deal = even_deal(world, chunks)
        self._chunks = chunks
        self._each: list[list[float]] = [[] for _ in range(world)]
        self._known = [0.0] * world

    def took(self, seconds: Sequence[float]) -> None:
        """What every rank needed for its chunks of a meta-step."""
        for times, held, spent in zip(self._each, self.deal, seconds, strict=True):
            if len(held):
                times.append(spent / len(held))

    def deal_anew(self) -> None:
        """Deal by speed if that pays.

        Of each rank's times the median counts. One that had nothing to do is taken to have become twice as fast, so that it is tried
        again some time; where nothing is known of it, to be as fast as the fastest.
        """
        for rank, times in enumerate(self._each):
            self._known[rank] = sorted(times)[len(times) // 2] if times else self._known[rank] / 2
        self._each = [[] for _ in self._each]
        known = [each for each in self._known if each > 0]
        if not known:
            return
        seconds = [each if each > 0 else min(known) for each in self._known]
        better = deal_by_speed(seconds, self._chunks)
        if duration(better, seconds) < GAIN * duration(self.deal, seconds):
            self.deal = better
