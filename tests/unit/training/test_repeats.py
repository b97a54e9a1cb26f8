"""The spread of repeats against Student's table and hand-made numbers."""

import math

import pytest

from imaml_dist.training.repeats import Spread, student_t


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)]
)
def test_the_quantiles_are_those_of_the_tables(degrees, t):
    assert student_t(degrees) == pytest.approx(t, abs=5e-5)


def test_other_shares():
    assert student_t(10, 0.99) == pytest.approx(3.1693, abs=5e-5)


def test_mean_sd_and_interval():
    spread = Spread.of([0.90, 0.92, 0.94])
    assert (spread.mean, spread.sd, spread.n) == (pytest.approx(0.92), pytest.approx(0.02), 3)
    assert spread.ci95 == pytest.approx(4.3027 * 0.02 / math.sqrt(3), abs=1e-6)


def test_one_repeat_says_nothing_of_the_spread():
    spread = Spread.of([0.5])
    assert spread.mean == 0.5 and math.isnan(spread.sd) and math.isnan(spread.ci95)
