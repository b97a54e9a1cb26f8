"""Between Ray Tune and a sweep's ledger: a searcher that hands out the ledger's trials, and schedulers that are told of the past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from imaml_dist.config.sweep import AshaConfig, MedianConfig, SchedulerConfig
from imaml_dist.storage.local import exclusive
from imaml_dist.sweeps.ledger import Trial
from imaml_dist.sweeps.search import METRIC, TIME, Search
from imaml_dist.training.run_directory import RunDirectory


class _OfThisProcess:
    """Tune writes copies of itself and its parts to disk, from which we never read; theirs hold nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class RaySearcher(_OfThisProcess, Searcher):  # type: ignore[misc]
    """Asks `Search` for trials, and tells it how they ended.

    Args:
        search: of the sweep.
        order: what a trial's keeper is told.
    """

    def __init__(self, search: Search, order: Callable[[Trial], dict[str, Any]]) -> None:
        super().__init__()
        self._search, self._order = search, order
        self._numbers: dict[str, int] = {}
        self._leaving: list[RunDirectory] = []

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        """Nothing: the sweep has said it all."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; none after a request to stop. The end is told when no stopped trial is still leaving: Tune waits for seconds
        only when it ends, and a trial may need longer to do so in good order."""
        trial = None
        if self._search.broken is None and not self._search.directory.stop_file.exists():
            with self._kept():
                trial = self._search.next()
        if trial is None:
            self._leaving = [run for run in self._leaving if _is_trained(run)]
            return None if self._leaving else str(Searcher.FINISHED)
        self._numbers[trial_id] = trial.number
        return self._order(trial)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended; one that was interrupted has not."""
        with self._kept():
            self._note(self._numbers[trial_id], result or {}, error)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Tune would take an exception for the trial's, and start that again."""
        try:
            yield
        except Exception as error:  # raised when Tune has ended
            self._search.broken = self._search.broken or error

    def _note(self, number: int, said: Mapping[str, Any], error: bool) -> None:
        if error:
            losses = self._search.ledger.trial(number).losses + 1
            log = self._search.directory.log_file(self._search.ledger.trial(number))
            self._search.failed(number, f"it crashed {losses} time{'s' if losses > 1 else ''}; see {log}")
            return
        match said.get("outcome", "stopped"):
            case "finished":
                self._search.finished(number)
            case "failed":
                self._search.failed(number, str(said.get("why", "")))
            case "stopped":
                self._leaving.append(self._search.directory.run(self._search.ledger.trial(number)))
                self._search.stopped(number, int(said.get(TIME, 0)))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the ledger has it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to take up."""


def _is_trained(run: RunDirectory) -> bool:
    """Whether a training command has the run directory for itself."""
    with exclusive(run.driver_lock) as held:
        return not held


class Losses(_OfThisProcess, Callback):  # type: ignore[misc]
    """Notes trials that crashed and are started again.

    Args:
        search: of the sweep.
    """

    def __init__(self, search: Search) -> None:
        self._search = search

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune is about to start a trial again."""
        try:
            self._search.lost(int(trial.config["number"]))
        except Exception as error:  # as in `RaySearcher`
            self._search.broken = self._search.broken or error


class _Median(MedianStoppingRule):  # type: ignore[misc]
    """Tune's, which pauses trials while it knows of too few others; pausing would only cost them a start. A trial that is started again
    after a crash reports its validations again; Tune's would count them twice, and take the trial back to its first step."""

    def recall(self, past: _Past, reports: Sequence[Mapping[str, Any]]) -> None:
        """Know of a trial without an opinion of it."""
        self._results[past] += [dict(report) for report in reports]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's opinion of a validation that is new."""
        known = self._results.get(trial)
        if known and result.get(TIME, 0) <= known[-1][TIME]:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: all validations are known, and a trial that failed before its first has none."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return str(TrialScheduler.CONTINUE)


def make_scheduler(config: SchedulerConfig, steps: int) -> TrialScheduler:
    """Tune's scheduler of that kind.

    Args:
        config: of the scheduler.
        steps: meta-steps of the longest trial.
    """
    measure = {"time_attr": TIME, "metric": METRIC, "mode": "max"}
    match config:
        case AshaConfig():
            # A trial that reaches its last step ends by itself.
            return ASHAScheduler(
                **measure,
                max_t=steps,
                grace_period=config.grace,
                reduction_factor=config.reduction,
                stop_last_trials=False,
            )
        case MedianConfig():
            return _Median(**measure, grace_period=config.grace, min_samples_required=config.min_trials)
        case _:
            return FIFOScheduler()


@dataclass(frozen=True)
class _Past:
    """A trial that has ended, as far as schedulers look at one."""

    trial_id: str


def replay(scheduler: TrialScheduler, trials: Iterable[tuple[Trial, Sequence[Mapping[str, Any]]]]) -> None:
    """Tell a scheduler what earlier trials reported; its opinion of them is no longer asked.

    Args:
        scheduler: new.
        trials: that have ended, with their reports.
    """
    for trial, reports in trials:
        past = _Past(f"trial-{trial.name}")
        if isinstance(scheduler, _Median):
            if reports:
                scheduler.recall(past, reports)
            continue
        scheduler.on_trial_add(None, past)
        for report in reports:
            scheduler.on_trial_result(None, past, dict(report))
        if reports:
            scheduler.on_trial_complete(None, past, dict(reports[-1]))
