"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere, and the leaderboard at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from imaml_dist.sweeps.directory import SweepDirectory
from imaml_dist.sweeps.ledger import Trial
from imaml_dist.sweeps.search import METRIC, Search
from imaml_dist.tracking.metrics_file import Follower
from pipelines import console

ROWS = 24
"""Of the live table."""


class SweepTable:
    """Use as a context manager, and `update` now and then.

    Args:
        search: of the sweep.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._told = {trial.number: trial.status for trial in search.ledger.trials if trial.ended is not None}
        self._lost = {trial.number: trial.losses for trial in search.ledger.trials}
        self._followers: dict[int, Follower] = {}
        self._steps: dict[int, int] = {}
        self._last: dict[int, dict[str, Any]] = {}
        self._live = Live(console=console.out, refresh_per_second=2) if console.out.is_terminal else None

    def __enter__(self) -> SweepTable:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update()
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def update(self) -> None:
        """Show what is new."""
        trials = self._search.ledger.trials
        for trial in trials:
            if trial.status == "running":
                self._follow(trial)
        if self._live is not None:
            self._live.update(self._table(trials))
            return
        for trial in trials:
            for line in self._news(trial):
                console.out.print(line, soft_wrap=True)

    def _follow(self, trial: Trial) -> None:
        follower = self._followers.setdefault(trial.number, Follower(self._search.directory.run(trial).metrics_file))
        for record in follower.poll():
            self._steps[trial.number] = record["step"] + 1
            if record.get(METRIC) is not None:
                self._last[trial.number] = record

    def _news(self, trial: Trial) -> list[str]:
        lines = []
        if trial.number not in self._lost:
            lines.append(f"trial {trial.number} begins: {spoken(trial.values)}")
        if trial.losses > self._lost.get(trial.number, 0):
            lines.append(f"trial {trial.number} crashed, and is started again")
        self._lost[trial.number] = trial.losses
        if trial.ended is not None and trial.number not in self._told:
            self._told[trial.number] = trial.status
            result = trial.result
            how = f"validation {console.percent(result.accuracy, result.ci95)}, {result.steps} meta-steps"
            lines.append(f"trial {trial.number} {trial.status}: {trial.why or how} ({len(self._told)} have ended)")
        return lines

    def _table(self, trials: list[Trial]) -> Table:
        ended = sum(trial.ended is not None for trial in trials)
        shown = trials[-ROWS:]
        whole = ended + self._search.left + sum(trial.status == "running" for trial in trials)
        grid = _grid(
            f"{self._search.sweep.config.name}: {ended} of {max(whole, ended)} trials have ended",
            list(trials[0].values) if trials else [],
        )
        for trial in shown:
            last = self._last.get(trial.number, {})
            running = trial.status == "running"
            accuracy = (
                console.percent(last.get(METRIC), last.get("val_ci95")) if running else _accuracy(vars(trial.result))
            )
            steps = self._steps.get(trial.number, 0) if running else trial.result.steps
            again = f" ({trial.losses} crashed)" if trial.losses else ""
            grid.add_row(
                str(trial.number), *map(_short, trial.values.values()), trial.status + again, str(steps), accuracy
            )
        return grid


def show_outcome(found: dict[str, Any], directory: SweepDirectory) -> None:
    """The leaderboard that ends a sweep.

    Args:
        found: the content of `sweep.json`.
        directory: of the sweep.
    """
    rows = sorted(found["trials"], key=lambda row: (row["accuracy"] is None, -(row["accuracy"] or 0.0), row["trial"]))
    grid = _grid(f"{found['name']}: {len(rows)} trials", list(found["space"]))
    for row in rows:
        grid.add_row(
            str(row["trial"]), *map(_short, row["values"].values()), row["status"], str(row["steps"]), _accuracy(row)
        )
    console.whole_lines().print(grid)
    tested = found["test"]
    if tested is not None:
        console.out.print(
            f"best: trial {found['best']}, test accuracy {console.percent(tested['accuracy'], tested['ci95'])} ({tested['tasks']} tasks)",
            soft_wrap=True,
        )
    console.out.print(f"train it again with {directory.best_file}; look at {directory.report_file}", soft_wrap=True)


def spoken(values: dict[str, Any]) -> str:
    """`algorithm.lam=0.123, algorithm.inner.steps=4`."""
    return ", ".join(f"{field}={_short(value)}" for field, value in values.items())


def _grid(title: str, fields: list[str]) -> Table:
    grid = Table(title=title, title_justify="left")
    for name in ("trial", *(field.removeprefix("algorithm.") for field in fields), "status", "steps", "validation"):
        grid.add_column(name, justify="left" if name == "status" else "right")
    return grid


def _accuracy(result: dict[str, Any]) -> str:
    return console.percent(result["accuracy"], result["ci95"])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(_short(one) for one in value.values())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
