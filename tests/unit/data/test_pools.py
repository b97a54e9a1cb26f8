"""Class pools: what recurs within a window, what does not outlast it, and that all classes remain as likely."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch

from imaml_dist.data.episodes import EpisodeSource, draw_episode
from imaml_dist.data.philox import Domain, Stream
from imaml_dist.data.pools import ClassPools
from imaml_dist.errors import ConfigError

GOLDEN = ((647, 964, 194, 830, 1197, 1185), (244, 1043, 181, 605, 523, 185))
"""Of two windows; they may never change under SPEC_VERSION 1."""


def source(dataset, **changes):
    return EpisodeSource(dataset, **{"split": "train", "way": 3, "shot": 1, "query": 2, "seed": 1, **changes})


def test_golden_pools():
    pools = ClassPools(seed=7, classes=1200, size=6, steps=100)
    assert pools.at(0) == pools.at(99) == GOLDEN[0]
    assert pools.at(100) == GOLDEN[1]
    assert list(GOLDEN[1]) == Stream(7, Domain.CLASS_POOL, 1, 0, ordinal=1).sample(1200, 6)
    assert draw_episode(7, 0, 100, 3, [20] * 1200, way=3, shot=1, query=1, pool=GOLDEN[1])[0] == [
        GOLDEN[1][i] for i in Stream(7, 0, 100, 3).sample(6, 3)
    ]


def test_within_a_window_classes_come_from_its_pool_and_later_from_another(dataset):
    s = source(dataset, pool=4, pool_steps=10)
    for window in range(3):
        steps = range(10 * window, 10 * window + 10)
        used = {c for step in steps for task in range(8) for c in s.draw(step, task)[0]}
        assert used == set(ClassPools(1, 12, 4, 10).at(steps[0]))
    assert len({ClassPools(1, 12, 4, 10).at(step) for step in (0, 10, 20)}) == 3


def test_draws_are_pure_in_any_order_and_from_any_thread(dataset):
    s = source(dataset, pool=5, pool_steps=2)
    places = [(step, task) for step in range(60) for task in range(3)]
    expected = [source(dataset, pool=5, pool_steps=2).draw(*place) for place in reversed(places)][::-1]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda place: s.draw(*place), places)) == expected


def test_without_a_pool_nothing_is_different(dataset):
    assert source(dataset).draw(3, 4) == source(dataset, pool=None, pool_steps=7).draw(3, 4)
    batches = [source(dataset, pool=p).episodes(0, range(2)) for p in (None, 4)]
    assert torch.equal(batches[0].key, batches[1].key)


def test_every_pair_of_classes_is_as_likely():
    """Of an episode's classes, over windows: by the pool and by the draw from it together."""
    classes, way, windows = 7, 3, 7000
    pools = ClassPools(seed=3, classes=classes, size=4, steps=1)
    counts = dict.fromkeys(combinations(range(classes), 2), 0)
    for step in range(windows):
        drawn, _ = draw_episode(3, 0, step, 0, [4] * classes, way=way, shot=1, query=1, pool=pools.at(step))
        for pair in combinations(sorted(drawn), 2):
            counts[pair] += 1
    expected = windows * 3 / len(counts)
    # 0.1 % of the chi-square distribution with 20 degrees of freedom; pairs of one episode are a little less scattered.
    assert sum((c - expected) ** 2 for c in counts.values()) / expected < 45.3


def test_pools_that_do_not_fit_are_refused(dataset):
    for pool in (2, 13):
        with pytest.raises(
            ConfigError, match=rf"data\.pool: {pool} classes given, but an episode has 3 .* choose 3 to 12"
        ):
            source(dataset, pool=pool)
