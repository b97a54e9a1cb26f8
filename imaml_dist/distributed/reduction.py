"""Sums over all tasks of a meta-step, taken in an order that does not depend on who computed which part.

Floating-point addition is not associative: an all-reduce over 2 and over 3 workers gives different bits. The exact
reduction adds one row per chunk along one fixed binary tree, whoever holds which chunk:

1. A rank holds neighbouring chunks, and adds what lies below nodes of the tree that are wholly its own: c chunks become k rows,
   k = 1 where c is a power of two that divides the place of the first, and never more than 2 log2(c + 1).
2. Every rank is given one segment of P / W numbers of all these rows, and adds them along the rest of the tree.
3. The segments are gathered.

Each rank sends `(k + 1) P (W - 1) / W` numbers; a ring all-reduce sends `2 P (W - 1) / W`, which is k = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imaml_dist.distributed.chunks import dealt_to
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


def own_nodes(held: range, chunks: int) -> list[range]:
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

    return below(0, _width(chunks))


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


def exact_sum(group: Group, mine: Tensor, chunks: int) -> Tensor:
    """Sum over all chunks along the tree, the same bits for every number of workers: `[c, P] -> [P]`.

    Args:
        group: the workers.
        mine: a row for each chunk dealt to this rank; c may be 0.
        chunks: number of chunks of the step, >= 1.
    """
    dealt = [dealt_to(rank, group.world, chunks) for rank in range(group.world)]
    nodes = [own_nodes(held, chunks) for held in dealt]
    first, size = dealt[group.rank].start, mine.shape[1]
    segment = -(-size // group.world)
    padded = mine.new_empty(len(nodes[group.rank]), segment * group.world)
    padded[:, size:] = 0
    for row, node in zip(padded, nodes[group.rank], strict=True):
        row[:size] = tree_sum(mine[node.start - first : node.stop - first])
    by_segment = padded.view(-1, group.world, segment).transpose(0, 1)
    rows = group.exchange(by_segment, [len(own) for own in nodes])
    added = join([node for own in nodes for node in own], rows, chunks)
    return torch.cat(group.gather(added))[:size]


def fast_sum(group: Group, mine: Tensor) -> Tensor:
    """Sum over all chunks by one all-reduce; its last bits depend on the number of workers: `[c, P] -> [P]`."""
    return group.sum(mine.sum(0))
