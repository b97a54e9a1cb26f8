"""What came out of a sweep: `sweep.json`, whose leaderboard is the same however often the sweep was interrupted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from imaml_dist.config.load_sweep import Sweep
from imaml_dist.sweeps.ledger import Trial


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best validation accuracy, of several the first; None where none has any."""
    return next(iter(ranked(trials)), None)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that were validated, the best first."""
    measured = [trial for trial in trials if trial.result.accuracy is not None]
    return sorted(measured, key=lambda trial: (-(trial.result.accuracy or 0.0), trial.number))


def outcome(
    sweep: Sweep, trials: Sequence[Trial], facts: Mapping[str, Any], test: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        sweep: as it was asked for.
        trials: at least one of them validated.
        facts: of data and software, by name.
        test: of the best trial.
    """
    order = ranked(trials)
    resolved = sweep.resolved()
    return {
        "name": sweep.config.name,
        "space": resolved["space"],
        "baseline": sweep.config.baseline,
        "searcher": resolved["searcher"],
        "scheduler": resolved["scheduler"],
        "budget": resolved["budget"],
        "validation_tasks": sweep.config.validation.tasks,
        **facts,
        "best": order[0].number,
        "median_accuracy": statistics.median([t.result.accuracy for t in order if t.result.accuracy is not None]),
        "test": None if test is None else dict(test),
        "trials": [_row(trial) for trial in sorted(trials, key=lambda trial: trial.number)],
    }


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "status": trial.status,
        "values": trial.values,
        **vars(trial.result),
        "losses": trial.losses,
        "why": trial.why,
        "began": trial.began,
        "ended": trial.ended,
    }
