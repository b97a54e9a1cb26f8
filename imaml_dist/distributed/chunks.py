"""Who computes what: a meta-step's tasks are cut into chunks of fixed size, and chunks are dealt to ranks.

The cut depends on the configuration alone; only the dealing depends on the number of workers. That is why the number
of workers cannot change a result.
"""

from __future__ import annotations


def chunks_of(tasks: int, size: int) -> list[range]:
    """Consecutive ranges of `size` tasks that cover 0 .. `tasks` - 1; the last one may be shorter."""
    return [range(begin, min(begin + size, tasks)) for begin in range(0, tasks, size)]


def dealt_to(rank: int, world: int, chunks: int) -> range:
    """Numbers of the chunks that a rank computes: consecutive, and as even as can be (none where world > chunks)."""
    return range(chunks * rank // world, chunks * (rank + 1) // world)
