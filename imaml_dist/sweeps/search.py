"""What is to be trained next, and what became of it: the searcher of a sweep, whoever runs the trials.

It knows nothing but the sweep and the ledger, so that it goes on after any interruption: trials that have not ended come first,
with the values that they began with; then new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imaml_dist.config.load_sweep import Sweep
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.sweeps.directory import SweepDirectory
from imaml_dist.sweeps.drawing import Values, corners, draw
from imaml_dist.sweeps.feasible import baseline_of
from imaml_dist.sweeps.ledger import Ledger, Result, Trial
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

TIME, METRIC = "meta_steps", "val_accuracy"
"""What trials report at each validation."""


class Search:
    """Hands out trials and writes down how they end.

    Args:
        sweep: as it was asked for.
        ledger: of the sweep.
        directory: of the sweep.
        resolve: makes a configuration one that says what every `auto` means here.
        trials: how many there shall be.
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        directory: SweepDirectory,
        resolve: Callable[[ExperimentConfig], ExperimentConfig],
        trials: int,
    ) -> None:
        self.sweep, self.ledger, self.directory = sweep, ledger, directory
        self._resolve, self._number_of_trials = resolve, trials
        self._waiting = [trial for trial in ledger.trials if trial.status == "running"]
        self._new = iter(range(len(ledger.trials), trials))

    @property
    def left(self) -> int:
        """Trials that are still to be handed out."""
        return len(self._waiting) + max(0, self._number_of_trials - len(self.ledger.trials))

    def next(self) -> Trial | None:
        """A trial whose configuration is written down; None when there is no other."""
        if self._waiting:
            trial = self._waiting.pop(0)
        else:
            number = next(self._new, None)
            if number is None:
                return None
            trial = self.ledger.begin(number, self._values(number))
        self.directory.write_config(trial, self._resolve(self.sweep.experiment(trial.values, self._decided(trial))))
        return trial

    @property
    def longest(self) -> int:
        """Meta-steps of the longest trial."""
        return max(self.sweep.experiment(values, {}).run.steps for values in corners(self.sweep.config.space))

    def lost(self, number: int) -> None:
        """A trial crashed, and is started again."""
        self.ledger.lose(number)

    def stopped(self, number: int, at_step: int) -> None:
        """The scheduler has stopped a trial, at so many meta-steps."""
        trial = self.ledger.trial(number)
        self.ledger.end(number, "stopped", measured(self.directory.run(trial), self._tasks(trial), at_step))

    def finished(self, number: int) -> None:
        """A trial was trained to its end."""
        trial = self.ledger.trial(number)
        self.ledger.end(number, "finished", measured(self.directory.run(trial), self._tasks(trial)))

    def failed(self, number: int, why: str) -> None:
        """A trial cannot be trained, or crashed too often."""
        trial = self.ledger.trial(number)
        self.ledger.end(number, "failed", measured(self.directory.run(trial), self._tasks(trial)), why)

    def _values(self, number: int) -> Values:
        config = self.sweep.config
        if config.baseline and number == 0:
            return baseline_of(self.sweep)
        if config.searcher.kind != "optuna":
            return draw(config, number)
        from imaml_dist.sweeps.tpe import propose

        return propose(config, number, self.ledger.trials)

    def _decided(self, trial: Trial) -> dict[str, Any]:
        """What the sweep decides for a trial, besides its values."""
        base = self.sweep.base()
        return {
            "name": f"{self.sweep.config.name}-{trial.name}",
            "validate.tasks": self.sweep.config.validation.tasks,
            "validate.manifest": str(self.directory.validation_file.resolve()),
            "evaluate.tasks": 0,
            "tracking.experiment": base.tracking.experiment or base.name,  # one for all trials
            "tracking.register": None,
        }

    def _tasks(self, trial: Trial) -> int:
        return self.sweep.experiment(trial.values, {}).run.tasks_per_step


def measured(run: RunDirectory, tasks_per_step: int, at_step: int | None = None) -> Result:
    """What a trial's metrics say of it.

    Args:
        run: of the trial.
        tasks_per_step: in training.
        at_step: count no more than so many meta-steps; None counts all.
    """
    records = [r for r in metrics_file.read(run.metrics_file) if at_step is None or r["step"] < at_step]
    validated = [r for r in records if r.get("val_accuracy") is not None]
    best = max(validated, key=lambda r: (r["val_accuracy"], -r["step"]), default=None)
    seconds = sum(float(r.get("seconds_step") or 0.0) for r in records)
    steps = max((r["step"] + 1 for r in records), default=0)
    if best is None:
        return Result(steps=steps, tasks=steps * tasks_per_step, seconds=round(seconds, 3))
    return Result(
        best["val_accuracy"], best.get("val_ci95"), best["step"] + 1, steps, steps * tasks_per_step, round(seconds, 3)
    )
