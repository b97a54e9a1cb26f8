"""Who computes what: a meta-step's tasks are cut into chunks of fixed size, and chunks are dealt to ranks.

The cut depends on the configuration alone; only the dealing depends on the number and the speed of workers. That is why these
cannot change a result.
"""

from __future__ import annotations

from collections.abc import Sequence

Deal = tuple[range, ...]
"""Numbers of the chunks of every rank: consecutive, and one rank's after the other's."""


def chunks_of(tasks: int, size: int) -> list[range]:
    """Consecutive ranges of `size` tasks that cover 0 .. `tasks` - 1; the last one may be shorter."""
    return [range(begin, min(begin + size, tasks)) for begin in range(0, tasks, size)]


def dealt_to(rank: int, world: int, chunks: int) -> range:
    """Numbers of the chunks that a rank computes: consecutive, and as even as can be (none where world > chunks)."""
    return range(chunks * rank // world, chunks * (rank + 1) // world)


def even_deal(world: int, chunks: int) -> Deal:
    """As `dealt_to` has it."""
    return tuple(dealt_to(rank, world, chunks) for rank in range(world))


def deal_by_speed(seconds: Sequence[float], chunks: int) -> Deal:
    """The deal that is done first: every chunk goes to the rank that would be done with it the soonest, the first of several.

    Args:
        seconds: of each rank for one chunk, > 0.
        chunks: number of chunks, >= 1.
    """
    counts = [0] * len(seconds)
    for _ in range(chunks):
        rank = min(range(len(seconds)), key=lambda r: ((counts[r] + 1) * seconds[r], r))
        counts[rank] += 1
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def duration(deal: Deal, seconds: Sequence[float]) -> float:
    """Seconds until the last rank is done."""
    return max(len(held) * each for held, each in zip(deal, seconds, strict=True))
