"""What is wrong with a sweep, found before anything starts: every corner of the space and every trial that is known by then is built."""

from __future__ import annotations

from typing import Any

from imaml_dist.config.load_sweep import Sweep
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.config.sweep import MOST_TRIALS, ChoiceSpace, GridSpace, SweepConfig
from imaml_dist.errors import ConfigError
from imaml_dist.sweeps.drawing import Values, contains, corners, draw, grid_of, points

MOST_TRIED = 1000
"""Trials whose configuration is built beforehand."""


def trials_of(sweep: SweepConfig, where: str) -> int:
    """How many trials the sweep has.

    Raises:
        ConfigError: searcher, space and budget do not go together.
    """
    searcher, asked = sweep.searcher.kind, sweep.budget.trials
    grid = grid_of(sweep.space, whole=searcher == "grid")
    endless = [field for field in sweep.space if field not in grid]
    if searcher == "grid" and endless:
        raise ConfigError(
            f"{where}: space.{endless[0]}: {sweep.space[endless[0]].kind} given, whose values searcher grid cannot all try; give kind "
            "grid with values, or take searcher random"
        )
    if searcher == "optuna" and (in_turn := [f for f, space in sweep.space.items() if isinstance(space, GridSpace)]):
        raise ConfigError(
            f"{where}: space.{in_turn[0]}: grid given, which searcher optuna does not go through; give kind choice, or take searcher grid"
        )
    if asked is None and (endless or searcher == "optuna"):
        raise ConfigError(f"{where}: budget.trials: is missing; say how many trials searcher {searcher} shall have")
    whole = points(grid) + sweep.baseline
    if whole > MOST_TRIALS:
        raise ConfigError(
            f"{where}: space: the grid has {whole} points, at most {MOST_TRIALS} are allowed; make it smaller"
        )
    if searcher == "grid" and asked not in (None, whole):
        raise ConfigError(
            f"{where}: budget.trials: {asked} given, but the grid {'and the baseline have' if sweep.baseline else 'has'} {whole} points; "
            "remove it, or take searcher random"
        )
    return whole if asked is None else asked


def baseline_of(sweep: Sweep) -> Values:
    """The base's own values of the fields of the space.

    Raises:
        ConfigError: one of them does not lie within it.
    """
    values: Values = {}
    base = sweep.base()
    for field, space in sweep.config.space.items():
        found = _at(base, field)
        if isinstance(space, (ChoiceSpace, GridSpace)):  # whole sections may be written shorter than they are
            same = [value for value in space.values if _at(sweep.experiment({field: value}, {}), field) == found]
            found = same[0] if same else found
        if not contains(space, found):
            raise ConfigError(
                f"{sweep.where}: baseline: the base's {field} is {found!r:.60}, which does not lie within its space; extend the space, "
                "or leave the baseline out"
            )
        values[field] = found
    return values


def _at(config: ExperimentConfig, field: str) -> Any:
    """The value of a field; of `algorithm.lam.init` also where the strength is written as a number alone."""
    found: Any = config.model_dump(by_alias=True)
    for key in field.split("."):
        number = key == "init" and isinstance(found, (int, float))
        found = found if number else found.get(key) if isinstance(found, dict) else None
    return found


def check_feasible(sweep: Sweep) -> list[ExperimentConfig]:
    """The configurations that trials may come to have.

    Raises:
        ConfigError: one of them is none, or the scheduler would have nothing to decide on.
    """
    config, where = sweep.config, sweep.where
    trials = trials_of(config, where)
    tried = corners(config.space) + [draw(config, n) for n in range(config.baseline, min(trials, MOST_TRIED))]
    tried += [baseline_of(sweep)] if config.baseline else []
    found = [sweep.experiment(values, {}) for values in tried]
    if config.scheduler.kind != "none":
        grace = config.scheduler.grace
        every = max(one.validation.every for one in found)
        steps = min(one.run.steps for one in found)
        if not every <= grace < steps:
            raise ConfigError(
                f"{where}: scheduler.grace: {grace} given, but trials validate every {every} of {steps} meta-steps, so that it must be "
                f"at least {every} and less than {steps}; change it, or set.validate.every"
            )
    return found
