"""What a trial draws: a function of seed and number alone, spread as its kind says, on the grid in order."""

import hashlib
import math
import random

import pytest

from imaml_dist.config.sweep import (
    ChoiceSpace,
    GridSpace,
    IntSpace,
    LogUniformSpace,
    SweepConfig,
    UniformSpace,
)
from imaml_dist.sweeps.drawing import at, corners, draw, unit

MANY = 4000


def sweep(searcher="random", **space):
    return SweepConfig.model_validate(
        {"name": "s", "base": {}, "space": space, "searcher": {"kind": searcher}, "budget": {"trials": 3}}
    )


SPACE = {
    "a.x": {"kind": "uniform", "low": -1.0, "high": 3.0},
    "a.y": {"kind": "loguniform", "low": 0.01, "high": 100.0},
    "b.n": {"kind": "int", "low": 2, "high": 5},
}


def test_the_same_seed_and_number_draw_the_same_whatever_else_is_drawn():
    first = [draw(sweep(**SPACE), number) for number in range(5)]
    assert [draw(sweep(**SPACE), number) for number in (4, 2, 0)] == [first[4], first[2], first[0]]
    alone = draw(sweep(**{"a.y": SPACE["a.y"]}), 3)
    assert alone == {"a.y": first[3]["a.y"]}
    assert len({str(values) for values in first}) == 5


def test_a_stream_is_the_mersenne_twister_of_the_sha512_of_its_name():
    name = b"5/3/algorithm.lam"
    number = int.from_bytes(name + hashlib.sha512(name).digest(), "big")
    assert unit(5, 3, "algorithm.lam") == random.Random(number).random()


@pytest.mark.parametrize(
    ("space", "below", "share"),
    [
        (UniformSpace(low=-1.0, high=3.0), 0.0, 0.25),
        (LogUniformSpace(low=0.01, high=100.0), 0.1, 0.25),
        (IntSpace(low=2, high=5), 3, 0.25),
        (IntSpace(low=1, high=7, log=True), 2, math.log(2) / math.log(8)),
        (ChoiceSpace(values=[1, 2, 3, 4]), 2, 0.25),
    ],
)
def test_values_are_spread_as_the_kind_says(space, below, share):
    values = [at(space, unit(7, number, "f")) for number in range(MANY)]
    found = sum(value < below for value in values) / MANY
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / MANY)


@pytest.mark.parametrize(
    "space", [IntSpace(low=2, high=5), IntSpace(low=1, high=6, log=True), ChoiceSpace(values=["a", "b"])]
)
def test_every_value_can_be_drawn_and_no_other(space):
    values = {at(space, number / 997) for number in range(997)} | {at(space, 1.0)}
    allowed = set(range(space.low, space.high + 1)) if isinstance(space, IntSpace) else set(space.values)
    assert values == allowed


def test_ends_are_within_the_space():
    for space in (UniformSpace(low=0.1, high=0.3), LogUniformSpace(low=0.1, high=0.3)):
        assert (at(space, 0.0), at(space, 1.0)) == (0.1, pytest.approx(0.3))
        assert at(space, 1.0) <= 0.3


def test_a_grid_is_gone_through_with_the_last_field_first():
    config = sweep("grid", a={"kind": "grid", "values": [1, 2]}, b={"kind": "int", "low": 5, "high": 7})
    points = [(values["a"], values["b"]) for values in (draw(config, number) for number in range(6))]
    assert points == [(1, 5), (1, 6), (1, 7), (2, 5), (2, 6), (2, 7)]


def test_random_search_goes_through_grids_in_turn_and_draws_the_rest():
    config = sweep(a={"kind": "grid", "values": [1, 2]}, **SPACE)
    drawn = [draw(config, number) for number in range(4)]
    assert [values["a"] for values in drawn] == [1, 2, 1, 2]
    assert len({values["a.x"] for values in drawn}) == 4


def test_corners_have_every_end_of_every_field():
    space = {"a": UniformSpace(low=0.0, high=1.0), "b": GridSpace(values=["u", "v", "w"])}
    found = corners(space)
    assert {0.0, 1.0} <= {values["a"] for values in found}
    assert {values["b"] for values in found} == {"u", "v", "w"}
