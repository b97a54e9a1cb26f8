"""What Optuna proposes: a function of the sweep's seed, the trial's number and what is known of the trials before it.

No state of Optuna's is kept: each proposal comes from a study of its own, which is told the ledger's trials anew. So nothing of
it has to survive a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imaml_dist.config.sweep import (
    ChoiceSpace,
    GridSpace,
    IntSpace,
    LogUniformSpace,
    OptunaSearcherConfig,
    Space,
    SweepConfig,
    UniformSpace,
)
from imaml_dist.sweeps.drawing import Values, draw
from imaml_dist.sweeps.ledger import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def propose(sweep: SweepConfig, number: int, trials: Sequence[Trial]) -> Values:
    """The values of trial `number`.

    Args:
        sweep: whose searcher is `optuna`.
        number: of the new trial.
        trials: before it. Ended ones are what is learned from, also those that were stopped; where others run, values near theirs
            are avoided.
    """
    searcher = sweep.searcher
    assert isinstance(searcher, OptunaSearcherConfig)
    if number < searcher.startup:
        return draw(sweep, number)
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=0, multivariate=True, constant_liar=True, seed=(searcher.seed + number) % 2**32
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    spaces = {field: _distribution(space) for field, space in sweep.space.items()}
    for trial in trials:
        accuracy = trial.result.accuracy
        params = {field: _told(space, trial.values[field]) for field, space in sweep.space.items()}
        if trial.status == "running":
            study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=spaces))
        elif accuracy is None:
            study.add_trial(create_trial(state=TrialState.FAIL, params=params, distributions=spaces))
        else:
            study.add_trial(create_trial(value=accuracy, params=params, distributions=spaces))
    asked = study.ask(dict(spaces))
    return {field: _meant(space, asked.params[field]) for field, space in sweep.space.items()}


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match space:
        case UniformSpace():
            return FloatDistribution(space.low, space.high)
        case LogUniformSpace():
            return FloatDistribution(space.low, space.high, log=True)
        case IntSpace():
            return IntDistribution(space.low, space.high, log=space.log)
        case ChoiceSpace() | GridSpace():
            return CategoricalDistribution(tuple(range(len(space.values))))


def _told(space: Space, value: Any) -> Any:
    """As Optuna is told: a choice by its place, for values may be whole sections."""
    return space.values.index(value) if isinstance(space, ChoiceSpace | GridSpace) else value


def _meant(space: Space, value: Any) -> Any:
    return space.values[value] if isinstance(space, ChoiceSpace | GridSpace) else value
