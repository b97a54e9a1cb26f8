"""What Optuna proposes: the same for the same past, near what did well, and a choice's value whatever its type."""

import pytest

from imaml_dist.config.sweep import SweepConfig
from imaml_dist.sweeps.drawing import draw
from imaml_dist.sweeps.ledger import Result, Trial
from imaml_dist.sweeps.tpe import propose

pytest.importorskip("optuna", reason="optuna is not installed")
SOLVERS = [{"kind": "dual"}, {"kind": "minres", "max_iterations": 4}]


@pytest.fixture
def sweep():
    space = {
        "lam": {"kind": "loguniform", "low": 0.01, "high": 100.0},
        "n": {"kind": "int", "low": 1, "high": 9},
        "solver": {"kind": "choice", "values": SOLVERS},
    }
    searcher = {"kind": "optuna", "seed": 3, "startup": 8}
    return SweepConfig.model_validate(
        {"name": "s", "base": {}, "space": space, "searcher": searcher, "budget": {"trials": 40}}
    )


def score(values):
    """Best at lam = 1, n = 5 and the second solver."""
    from math import log10

    return 1 - 0.1 * log10(values["lam"]) ** 2 - 0.02 * abs(values["n"] - 5) + 0.1 * (values["solver"] == SOLVERS[1])


def past(sweep, count):
    trials = []
    for number in range(count):
        values = propose(sweep, number, trials)
        trials.append(Trial(number, values, "finished", Result(accuracy=score(values)), ended=1.0))
    return trials


def test_it_begins_by_chance_and_is_a_function_of_the_past(sweep):
    trials = past(sweep, 12)
    assert [trial.values for trial in trials[:8]] == [draw(sweep, number) for number in range(8)]
    assert propose(sweep, 12, trials) == propose(sweep, 12, trials)
    assert [trial.values for trial in past(sweep, 12)] == [trial.values for trial in trials]


def test_it_finds_better_values_than_chance(sweep):
    trials = past(sweep, 40)
    proposed = [score(trial.values) for trial in trials[20:]]
    by_chance = [score(draw(sweep, number)) for number in range(20, 40)]
    assert sum(proposed) / 20 > sum(by_chance) / 20 + 0.05


def test_values_that_are_sections_and_trials_that_failed_or_run_are_understood(sweep):
    trials = past(sweep, 9)
    trials.append(Trial(9, draw(sweep, 9)))
    trials.append(Trial(10, draw(sweep, 10), "failed", why="it crashed", ended=1.0))
    values = propose(sweep, 11, trials)
    assert values["solver"] in SOLVERS and 1 <= values["n"] <= 9 and 0.01 <= values["lam"] <= 100.0
