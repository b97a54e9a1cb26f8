"""Sums over all tasks of a meta-step, taken in an order that does not depend on who computed which part.

Floating-point addition is not associative: an all-reduce over 2 and over 3 workers gives different bits. The exact
reduction adds one row per chunk along one fixed binary tree, whoever holds which chunk:

1. A rank holds neighbouring chunks, and adds what lies below nodes of the tree that are wholly its own: c chunks become k rows,
   k = 1 where c is a power of two that divides the place of the first, and never more than 2 log2(c + 1).
2. Every rank is given one segment of P / W numbers of all these rows, and adds them along the rest of the tree.
3. The segments are gathered.

Each rank sends `(k + 1) P (W - 1) / W` numbers; a ring all-reduce sends `2 P (W - 1) / W`, which is k = 1. All rows but a rank's
last travel while later chunks are computed. What is left then is the traffic of an all-reduce, which nothing can hide: the last
chunk's gradient must reach everybody after it is there. Splitting nodes so that more travels early would only add rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from imaml_dist.distributed.chunks import Deal
from imaml_dist.distributed.group import Group


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


def gather_chunks(group: Group, mine: Tensor, deal: Deal) -> Tensor:
    """One row per chunk from all ranks, in order of chunks.

    Args:
        group: the workers.
        mine: `[c, ...]`, a row for each chunk dealt to this rank; c may be 0.
        deal: which rank holds which chunks.

    Returns:
        `[chunks, ...]`, the same on every rank.
    """
    counts = [len(held) for held in deal]
    padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    padded[: mine.shape[0]] = mine
    return torch.cat([part[:count] for part, count in zip(group.gather(padded), counts, strict=True)])


@lru_cache(maxsize=4096)  # one per rank of a deal, which seldom changes
def own_nodes(held: range, chunks: int) -> tuple[range, ...]:
    """The largest nodes of the tree over `chunks` rows that lie within `held`, as ranges of rows, in order.

    A node of level l covers rows i 2^l to (i + 1) 2^l, those that there are; its value is `tree_sum` of them.
    """

    def below(begin: int, width: int) -> list[range]:
        end = min(begin + width, chunks)
        if begin >= end or end <= held.start or held.stop <= begin:
            return []
        if held.start <= begin and end <= held.stop:
            return [range(begin, end)]
        return below(begin, width // 2) + below(begin + width // 2, width // 2)

    return tuple(below(0, _width(chunks)))


def join(nodes: Sequence[range], rows: Tensor, chunks: int) -> Tensor:
    """The value of the whole tree from the values of nodes that together cover it: `[len(nodes), ...] -> [...]`."""
    known: dict[tuple[int, int], Tensor] = {(n.start, n.stop): row for n, row in zip(nodes, rows, strict=True)}

    def value(begin: int, width: int) -> Tensor:
        found = known.get((begin, min(begin + width, chunks)))
        if found is not None:
            return found
        half = width // 2
        left = value(begin, half)
        return left if begin + half >= chunks else left + value(begin + half, half)

    return value(0, _width(chunks))


def _width(chunks: int) -> int:
    """Rows of a full tree that has room for so many."""
    return 1 << (chunks - 1).bit_length()


class ExactSum:
    """Sum over all chunks of a step along the tree, the same bits for every number of workers.

    Rows are given as they are computed. A finished node that is not this rank's last is sent at once, so that its way is gone while
    the next chunks are computed; held are the rows of the node that is being made, added up as far as they go (log2 of its chunks).

    Args:
        group: the workers.
        deal: which rank holds which chunks of the step.
        like: an empty tensor of the rows' type and device.
        size: P.
    """

    def __init__(self, group: Group, deal: Deal, like: Tensor, size: int) -> None:
        self._group, self._chunks, self._like, self._size = group, deal[-1].stop, like, size
        self._nodes = [own_nodes(held, self._chunks) for held in deal]
        self._segment = -(-size // group.world)
        self._counter: list[tuple[int, Tensor]] = []
        self._given = 0
        self._sent: list[Callable[[], Tensor]] = []

    def add(self, row: Tensor) -> None:
        """The sum over the next chunk dealt to this rank, `[P]`."""
        count = 1
        while self._counter and self._counter[-1][0] == count:
            row, count = self._counter.pop()[1] + row, 2 * count
        self._counter.append((count, row))
        self._given += 1
        if self._given == len(self._nodes[self._group.rank][len(self._sent)]):
            self._send(self._node())

    def finish(self) -> Tensor:
        """Wait for the others: `[P]`. Every rank's chunks must have been added.

        Raises:
            PeerLostError: another rank is gone.
        """
        while len(self._sent) < max(map(len, self._nodes)):
            self._send(None)
        rounds = [list(receive()) for receive in self._sent]
        nodes, rows = [], []
        for own in self._nodes:
            for node, came in zip(own, rounds, strict=False):
                nodes.append(node)
                rows.append(came.pop(0))
        return torch.cat(self._group.gather(join(nodes, torch.stack(rows), self._chunks)))[: self._size]

    def _node(self) -> Tensor:
        """The value of the node whose rows have all been given: what is left in the counter, the last first, as `tree_sum` adds."""
        value = self._counter.pop()[1]
        while self._counter:
            value = self._counter.pop()[1] + value
        self._given = 0
        return value

    def _send(self, value: Tensor | None) -> None:
        """This round's node of every rank that has one."""
        number, world = len(self._sent), self._group.world
        mine = self._like.new_zeros(int(value is not None), self._segment * world)
        if value is not None:
            mine[0, : self._size] = value
        counts = [int(len(own) > number) for own in self._nodes]
        self._sent.append(self._group.exchange(mine.view(len(mine), world, self._segment).transpose(0, 1), counts))


class FastSum:
    """Sum over all chunks by one all-reduce; its last bits depend on the number of workers. Arguments as for `ExactSum`."""

    def __init__(self, group: Group, deal: Deal, like: Tensor, size: int) -> None:
        self._group, self._total = group, like.new_zeros(size)

    def add(self, row: Tensor) -> None:
        """See `ExactSum.add`."""
        self._total += row

    def finish(self) -> Tensor:
        """See `ExactSum.finish`."""
        return self._group.sum(self._total)
