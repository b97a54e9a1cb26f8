"""Sums over all tasks of a meta-step, taken in an order that does not depend on who computed which part.

Floating-point addition is not associative: an all-reduce over 2 and over 3 workers gives different bits. The exact
reduction gathers one row per chunk from all ranks and adds them along one fixed binary tree, everywhere alike.
Traffic per rank: `chunks * P` numbers, against about `2 P` of a ring all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from imaml_dist.distributed.chunks import dealt_to
from imaml_dist.errors import ImamlError


class Group(Protocol):
    """The workers of a run, as seen by one of them."""

    rank: int
    world: int

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor, in order of ranks; all have one shape."""
        ...

    def sum(self, mine: Tensor) -> Tensor:
        """Sum over ranks, in the communication library's own order."""
        ...


class Alone:
    """A group of one."""

    rank, world = 0, 1

    def gather(self, mine: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        return [mine]

    def sum(self, mine: Tensor) -> Tensor:
        """See `Group.sum`."""
        return mine


class ProcessGroup:
    """The default process group of torch.distributed, which must be initialised."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, mine: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine.contiguous())
        return parts

    def sum(self, mine: Tensor) -> Tensor:
        """See `Group.sum`."""
        total = mine.clone()
        dist.all_reduce(total)
        return total


def first_rank_decides(group: Group, decide: Callable[[], int]) -> int:
    """What rank 0's `decide` returns, on every rank. What it raises is raised on every rank, so that none waits for another.

    Raises:
        ImamlError: raised by `decide`; ranks other than 0 only know that it was.
    """
    choice, error = [0, 0], None
    if group.rank == 0:
        try:
            choice = [1, decide()]
        except ImamlError as caught:
            error = caught
    found, value = group.gather(torch.tensor(choice, dtype=torch.int64))[0].tolist()
    if error is not None:
        raise error
    if not found:
        raise ImamlError("rank 0 gave up; its own error says why")
    return int(value)


def tree_sum(rows: Tensor) -> Tensor:
    """Sum of n >= 1 rows along a fixed binary tree: `[n, ...] -> [...]`.

    Neighbours are added pairwise until one row is left; an odd last row moves up as it is. The order depends on n
    alone.
    """
    while rows.shape[0] > 1:
        even = rows.shape[0] // 2 * 2
        paired = rows[0:even:2] + rows[1:even:2]
        rows = paired if even == rows.shape[0] else torch.cat([paired, rows[even:]])
    return rows[0]


def gather_chunks(group: Group, mine: Tensor, chunks: int) -> Tensor:
    """One row per chunk from all ranks, in order of chunks.

    Args:
        group: the workers.
        mine: `[c, ...]`, a row for each chunk dealt to this rank; c may be 0.
        chunks: number of chunks of the step.

    Returns:
        `[chunks, ...]`, the same on every rank.
    """
    counts = [len(dealt_to(rank, group.world, chunks)) for rank in range(group.world)]
    padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    padded[: mine.shape[0]] = mine
    return torch.cat([part[:count] for part, count in zip(group.gather(padded), counts, strict=True)])


def exact_sum(group: Group, mine: Tensor, chunks: int) -> Tensor:
    """Sum over all chunks, the same bits for every number of workers: `[c, P] -> [P]`."""
    return tree_sum(gather_chunks(group, mine, chunks))


def fast_sum(group: Group, mine: Tensor) -> Tensor:
    """Sum over all chunks by one all-reduce; its last bits depend on the number of workers: `[c, P] -> [P]`."""
    return group.sum(mine.sum(0))
