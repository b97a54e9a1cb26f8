"""Golden values of the drawing rules: these numbers are the format, and may never change under SPEC_VERSION 1."""

import hashlib
import json

import pytest

from imaml_dist.data.episodes import draw_episode
from imaml_dist.data.philox import Stream


def test_raw_words():
    stream = Stream(7, 0, 0, 0)
    assert [stream.u64() for _ in range(8)] == [
        16086915834549238692,
        5448529601018347655,
        7749434361382612120,
        7478167007443709522,
        1528177845972429030,
        12850608683640892364,
        5466832663749895058,
        11447348607159190017,
    ]
    stream = Stream(7, 1, 3, 5)
    assert [stream.u64() for _ in range(4)] == [
        14045922333479190230,
        3440910515472528961,
        5190383535471053851,
        9016440668406469797,
    ]


def _philox4x64(key, counter):
    """Philox4x64-10 written out from its paper, on Python integers."""
    mask = (1 << 64) - 1
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k[0], second & mask, (first >> 64) ^ x[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


@pytest.mark.parametrize(
    ("seed", "domain", "step", "task", "ordinal"), [(7, 0, 0, 0, 0), (2**63, 2, 10**9, 31, 5), (1, 16, 3, 4, 1)]
)
def test_words_are_those_of_the_published_generator(seed, domain, step, task, ordinal):
    stream = Stream(seed, domain, step, task, ordinal)
    for block in range(1, 40):
        assert [stream.u64() for _ in range(4)] == _philox4x64([seed, domain], [block, ordinal, step, task])


def test_golden_episodes():
    classes, images = draw_episode(7, 0, 0, 0, [600] * 64, way=5, shot=1, query=15)
    assert classes == [55, 19, 28, 27, 8]
    assert images[0] == [417, 178, 373, 11, 472, 502, 322, 269, 507, 385, 463, 47, 320, 414, 272, 280]
    classes, images = draw_episode(7, 0, 0, 0, [20] * 1200, way=5, shot=1, query=15)
    assert classes == [1046, 355, 505, 488, 103]
    assert images[0][:6] == [13, 6, 0, 3, 16, 17]
    classes, images = draw_episode(7, 2, 3, 5, [20] * 1200, way=20, shot=5, query=15)
    assert classes[:6] == [934, 854, 487, 912, 850, 521]
    assert images[0][:6] == [1, 15, 2, 19, 7, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 10])
def test_golden_digest_of_many_episodes_is_the_same_whoever_draws_them(world):
    drawn = []
    for rank in range(world):
        for step in range(6):
            for task in range(rank, 10, world):
                classes, images = draw_episode(7, 0, step, task, [600] * 64, way=5, shot=1, query=15)
                drawn.append(((step, task), (classes, images)))
    digest = hashlib.sha256(json.dumps(sorted(drawn)).encode()).hexdigest()
    assert digest.startswith("53e959cf5e6884d5")


def test_samples_are_distinct_and_every_integer_is_as_likely():
    counts = [0] * 7
    for task in range(7000):
        drawn = Stream(3, 0, 0, task).sample(7, 3)
        assert len(set(drawn)) == 3
        for i in drawn:
            counts[i] += 1
    expected = 3000
    chi2 = sum((c - expected) ** 2 / (expected * (1 - 3 / 7)) for c in counts) * 6 / 7
    assert chi2 < 22.5  # 0.1 % of the chi-square distribution with 6 degrees of freedom
    assert sorted(Stream(3, 0, 0, 0).sample(5, 5)) == [0, 1, 2, 3, 4]


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="6 distinct integers out of 5"):
        Stream(0, 0, 0, 0).sample(5, 6)
