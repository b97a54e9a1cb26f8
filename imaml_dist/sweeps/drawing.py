"""What values a trial has: a function of the sweep's seed and the trial's number, so that a resumed sweep draws the same trials.

Every field has a stream of its own, named by seed, trial and field: a field that is added or removed changes no other one's values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from imaml_dist.config.sweep import (
    ChoiceSpace,
    GridSpace,
    IntSpace,
    LogUniformSpace,
    Space,
    SweepConfig,
    UniformSpace,
)

Values = dict[str, Any]
"""By dotted name of a field."""

MOST_OF_A_RANGE = 1000
"""Whole numbers that a grid takes of a range."""


def enumerated(space: Space) -> list[Any] | None:
    """Every value, in order; None where there are too many."""
    if isinstance(space, ChoiceSpace | GridSpace):
        return list(space.values)
    if isinstance(space, IntSpace) and not space.log and space.high - space.low < MOST_OF_A_RANGE:
        return list(range(space.low, space.high + 1))
    return None


def grid_of(space: Mapping[str, Space], *, whole: bool) -> dict[str, list[Any]]:
    """The fields whose values come in turn, with these values.

    Args:
        space: of the sweep.
        whole: all fields that can be enumerated; else those of kind `grid` only.
    """
    found = {field: enumerated(one) for field, one in space.items() if whole or isinstance(one, GridSpace)}
    return {field: values for field, values in found.items() if values is not None}


def points(grid: Mapping[str, list[Any]]) -> int:
    """How many combinations."""
    return math.prod(len(values) for values in grid.values())


def point(grid: Mapping[str, list[Any]], number: int) -> Values:
    """One combination, the last field's values changing first; after the last one comes the first."""
    chosen: Values = {}
    for field, values in reversed(list(grid.items())):
        number, at = divmod(number, len(values))
        chosen[field] = values[at]
    return {field: chosen[field] for field in grid}


def draw(sweep: SweepConfig, number: int) -> Values:
    """The values of trial `number` under the searchers `grid` and `random`; for `optuna`, those drawn by chance.

    A baseline is not drawn; the trials after it have the values that those before them would have without it.
    """
    number -= sweep.baseline
    grid = grid_of(sweep.space, whole=sweep.searcher.kind == "grid")
    in_turn = point(grid, number)
    seed = 0 if sweep.searcher.kind == "grid" else sweep.searcher.seed
    return {
        field: in_turn[field] if field in in_turn else at(space, unit(seed, number, field))
        for field, space in sweep.space.items()
    }


def unit(seed: int, number: int, field: str) -> float:
    """A number in [0, 1) that depends on nothing else, the same in every version of Python."""
    return random.Random(f"{seed}/{number}/{field}").random()


def at(space: Space, share: float) -> Any:
    """The value at a share in [0, 1] of a space's probability.

    Numbers on a log scale are rounded to 12 digits, so that no machine's mathematical library shows in them.
    """
    match space:
        case UniformSpace():
            return space.low + share * (space.high - space.low)
        case LogUniformSpace():
            return _on_a_log_scale(space.low, space.high, share)
        case IntSpace() if space.log:
            found = math.floor(_on_a_log_scale(space.low, space.high + 1, share))
            return min(max(found, space.low), space.high)
        case IntSpace():
            return min(space.low + math.floor(share * (space.high - space.low + 1)), space.high)
        case _:
            return space.values[min(math.floor(share * len(space.values)), len(space.values) - 1)]


def contains(space: Space, value: Any) -> bool:
    """Whether a value lies within a space."""
    if isinstance(space, ChoiceSpace | GridSpace):
        return value in space.values
    whole = isinstance(value, int) and not isinstance(value, bool)
    right = whole if isinstance(space, IntSpace) else whole or isinstance(value, float)
    return right and space.low <= value <= space.high


def _on_a_log_scale(low: float, high: float, share: float) -> float:
    value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return min(max(float(f"{value:.12g}"), low), high)


def corners(space: Mapping[str, Space]) -> list[Values]:
    """Each end of each field with the others in their middle, and the ends of all fields together."""
    middle = {field: at(one, 0.5) for field, one in space.items()}
    found = [{field: at(one, share) for field, one in space.items()} for share in (0.0, 1.0)]
    for field, one in space.items():
        ends = one.values if isinstance(one, ChoiceSpace | GridSpace) else [at(one, 0.0), at(one, 1.0)]
        found += [middle | {field: end} for end in ends]
    return found
