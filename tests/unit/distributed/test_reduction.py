"""Exact reduction: the same bits whoever holds which chunk, over real gloo groups."""

import math

import pytest
import torch
from helpers.gloo import run_group

from imaml_dist.distributed.chunks import chunks_of, deal_by_speed, dealt_to, duration, even_deal
from imaml_dist.distributed.group import Alone, ProcessGroup
from imaml_dist.distributed.reduction import ExactSum, FastSum, gather_chunks, join, own_nodes, tree_sum
from imaml_dist.distributed.speeds import Speeds

CHUNKS, SIZE = 7, 1001


def _rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CHUNKS, SIZE, generator=generator) * torch.logspace(-4, 4, CHUNKS)[:, None]


def summed(how, group, mine, chunks):
    total = how(group, even_deal(group.world, chunks), mine.new_empty(0), mine.shape[1])
    for row in mine:
        total.add(row)
    return total.finish()


def _reduce_in_a_group() -> tuple:
    group = ProcessGroup()
    dealt = dealt_to(group.rank, group.world, CHUNKS)
    mine = _rows()[dealt.start : dealt.stop]
    return (
        summed(ExactSum, group, mine, CHUNKS).tolist(),
        summed(FastSum, group, mine, CHUNKS).tolist(),
        gather_chunks(group, mine, even_deal(group.world, CHUNKS)).tolist(),
    )


@pytest.fixture(scope="module")
def by_world():
    return {world: run_group(world, _reduce_in_a_group) for world in (1, 2, 3, 8)}


def test_exact_sum_has_the_same_bits_on_every_rank_and_number_of_ranks(by_world):
    expected = summed(ExactSum, Alone(), _rows(), CHUNKS).tolist()
    for world, ranks in by_world.items():
        for rank, (exact, _, gathered) in enumerate(ranks):
            assert exact == expected, f"rank {rank} of {world}"
            assert gathered == _rows().tolist()


def test_fast_sum_is_right_but_not_the_same_bits(by_world):
    """So that the test above can fail: a plain all-reduce over 3 ranks differs in its last bits."""
    truth = _rows().double().sum(0)
    for ranks in by_world.values():
        torch.testing.assert_close(torch.tensor(ranks[0][1]).double(), truth, rtol=1e-3, atol=1e-2)
    assert by_world[3][0][1] != by_world[1][0][1]


@pytest.mark.parametrize("n", range(1, 20))
def test_tree_sum_adds_every_row_once_in_pairs(n):
    rows = 2.0 ** torch.arange(n, dtype=torch.float64)[:, None]
    assert tree_sum(rows).item() == 2.0**n - 1
    names = [f"{i}" for i in range(n)]
    while len(names) > 1:
        names = [f"({a}+{b})" for a, b in zip(names[::2], names[1::2], strict=False)] + names[len(names) // 2 * 2 :]
    values = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))

    def by_name(name: str) -> torch.Tensor:
        if "+" not in name:
            return values[int(name)]
        depth = 0
        for i, c in enumerate(name):
            depth += (c == "(") - (c == ")")
            if c == "+" and depth == 1:
                return by_name(name[1:i]) + by_name(name[i + 1 : -1])
        raise AssertionError(name)

    assert torch.equal(tree_sum(values), by_name(names[0]))


@pytest.mark.parametrize("world", range(1, 12))
@pytest.mark.parametrize("chunks", range(1, 23))
def test_partial_sums_of_any_ranks_join_to_the_bits_of_the_tree(world, chunks):
    rows = torch.randn(chunks, 3, generator=torch.Generator().manual_seed(chunks))
    nodes = [node for rank in range(world) for node in own_nodes(dealt_to(rank, world, chunks), chunks)]
    assert [row for node in nodes for row in node] == list(range(chunks)), "every row once, in order"
    values = torch.stack([tree_sum(rows[node.start : node.stop]) for node in nodes])
    assert torch.equal(join(nodes, values, chunks), tree_sum(rows))


@pytest.mark.parametrize("chunks", [8, 24, 100, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 64])
def test_traffic_stays_near_that_of_an_all_reduce(world, chunks):
    for rank in range(world):
        held = dealt_to(rank, world, chunks)
        rows = len(own_nodes(held, chunks))
        assert rows <= max(0, 2 * math.log2(len(held) + 1))
        if chunks % world == 0 and (len(held) & (len(held) - 1)) == 0:
            assert rows == 1


@pytest.mark.parametrize("world", range(1, 12))
@pytest.mark.parametrize("chunks", [1, 4, 7, 10])
def test_every_chunk_is_dealt_once_and_evenly(world, chunks):
    dealt = [list(dealt_to(rank, world, chunks)) for rank in range(world)]
    assert [c for chunk in dealt for c in chunk] == list(range(chunks))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_chunks_cover_the_tasks_whatever_the_remainder():
    assert chunks_of(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert chunks_of(8, 4) == [range(4), range(4, 8)]


class Together:
    """All ranks of a group in one process: exchanges are noted, and done when all have been begun."""

    def __init__(self, world):
        self.world, self.sent = world, [[] for _ in range(world)]

    def member(self, rank):
        return _Member(self, rank)


class _Member:
    def __init__(self, all_ranks, rank):
        self.all, self.rank, self.world = all_ranks, rank, all_ranks.world

    def exchange(self, mine, counts):
        number = len(self.all.sent[self.rank])
        self.all.sent[self.rank].append(mine)
        assert mine.shape[1] == counts[self.rank]
        return lambda: torch.cat([rank[number][self.rank] for rank in self.all.sent])

    def gather(self, mine):
        raise _Segment(mine)


class _Segment(Exception):
    """What a rank would give to the others."""


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("chunks", range(1, 18))
@pytest.mark.parametrize("speeds", [None, (1.0, 4.0, 2.5)], ids=["even", "by speed"])
def test_rows_given_one_by_one_make_the_bits_of_the_tree_and_travel_as_soon_as_they_can(world, chunks, speeds):
    rows = torch.randn(chunks, 2 * world, generator=torch.Generator().manual_seed(chunks))
    together = Together(world)
    deal = even_deal(world, chunks) if speeds is None else deal_by_speed([speeds[r % 3] for r in range(world)], chunks)
    sums = [ExactSum(together.member(rank), deal, rows.new_empty(0), 2 * world) for rank in range(world)]
    for rank, total in enumerate(sums):
        for number in deal[rank]:
            total.add(rows[number])
        assert len(together.sent[rank]) == len(own_nodes(deal[rank], chunks)), "none waits"
    most = max(map(len, together.sent))
    for rank in range(world):
        while len(together.sent[rank]) < most:
            sums[rank]._send(None)
    found = []
    for total in sums:
        with pytest.raises(_Segment) as segment:
            total.finish()
        found.append(segment.value.args[0])
    assert torch.equal(torch.cat(found), tree_sum(rows))


def every_deal(world, chunks):
    """All of them."""
    if world == 1:
        yield ((range(chunks)),)
        return
    for last in range(chunks + 1):
        for others in every_deal(world - 1, chunks - last):
            yield (*others, range(chunks - last, chunks))


@pytest.mark.parametrize("chunks", [1, 2, 5, 8])
@pytest.mark.parametrize("seconds", [(1.0, 1.0), (1.0, 2.0), (1.0, 9.0), (3.0, 1.0, 1.0), (1.0, 2.2, 3.9)])
def test_no_deal_is_done_before_the_one_by_speed(seconds, chunks):
    deal = deal_by_speed(seconds, chunks)
    assert [number for held in deal for number in held] == list(range(chunks))
    assert duration(deal, seconds) == min(duration(other, seconds) for other in every_deal(len(seconds), chunks))


def test_ranks_are_dealt_by_their_median_speed_if_that_pays():
    speeds = Speeds(2, 8)
    even = speeds.deal
    for times in ((4.0, 4.2), (4.0, 90.0), (4.1, 4.2)):
        speeds.took(times)
    speeds.deal_anew()
    assert speeds.deal is even, "one slow step and a little noise"
    for _ in range(3):
        speeds.took((4.0, 12.0))
    speeds.deal_anew()
    assert [len(held) for held in speeds.deal] == [6, 2]
    speeds.took((6.0, 2.0))  # both as fast as the other now
    speeds.deal_anew()
    assert [len(held) for held in speeds.deal] == [4, 4]


def test_a_rank_that_had_nothing_to_do_is_tried_again():
    speeds = Speeds(3, 2)
    assert [len(held) for held in speeds.deal] == [0, 1, 1]
    speeds.took((0.0, 1.0, 9.0))
    speeds.deal_anew()
    assert [len(held) for held in speeds.deal] == [1, 1, 0]
    for _ in range(3):
        speeds.took((1.0, 1.0, 0.0))
        speeds.deal_anew()
    assert len(speeds.deal[2]) == 0, "it was nine times as slow"
    for _ in range(3):
        speeds.took((1.0, 3.0, 0.0))
        speeds.deal_anew()
    assert len(speeds.deal[2]) == 1
