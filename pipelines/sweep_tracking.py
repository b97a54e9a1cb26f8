"""A sweep in MLflow: a run above those of its trials, with what came out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from imaml_dist.config.load import flat
from imaml_dist.errors import ImamlError, TrackingError
from imaml_dist.storage.local import without_secrets
from imaml_dist.sweeps.search import Search
from imaml_dist.tracking.mlflow_parent import MlflowParent
from imaml_dist.tracking.mlflow_run import is_told
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console
from pipelines.mlflow_sync import sync
from pipelines.tracking import mlflow_parent


def server() -> dict[str, str]:
    """What trials on other nodes need to find this command's MLflow server; an address with a password they must have from their own."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    open_to_all = uri.startswith(("http://", "https://")) and uri == without_secrets(uri)
    return {"MLFLOW_TRACKING_URI": uri} if open_to_all else {}


class SweepTracking:
    """What MLflow is told of a sweep, if its base says that it is told anything. A server that is away never stops a sweep.

    Args:
        search: of the sweep, whose directory is begun.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._parent: MlflowParent | None = None
        base = search.sweep.base()
        if base.tracking.mlflow:
            directory = search.directory
            params = flat(search.sweep.resolved())
            self._parent = mlflow_parent(base, directory.path, params, [directory.sweep_file], kind="sweep")

    def begin(self) -> str:
        """The id of the MLflow run that trials are children of; empty if there is none."""
        if self._parent is None:
            return ""
        try:
            return self._parent.begin()
        except TrackingError as error:
            console.err.print(f"{error}; going on, and the trials become its children in the end", soft_wrap=True)
            return ""

    def close(self, status: str, found: dict[str, Any] | None = None) -> None:
        """Say how the sweep ended, and how trials did that could not say it themselves.

        Args:
            status: FINISHED, FAILED or KILLED.
            found: as in `sweep.json`.
        """
        if self._parent is None:
            return
        directory, trials = self._search.directory, self._search.ledger.trials
        tracked = [(trial, run) for trial in trials if (run := directory.run(trial)).mlflow_file.is_file()]
        for trial, run in tracked:
            if not is_told(run.path):  # its process crashed or was killed, or the server was away
                seen = "FAILED" if trial.status == "failed" else None
                self._try(lambda: sync(run.path, say=False, seen=seen))  # noqa: B023 - called at once
        self._try(lambda: self._close(status, found, [run for _, run in tracked]))

    def _close(self, status: str, found: dict[str, Any] | None, runs: list[RunDirectory]) -> None:
        assert self._parent is not None
        directory = self._search.directory
        files = [directory.outcome_file, directory.best_file, directory.report_file, directory.ledger_file]
        self._parent.close(status, [run.path for run in runs], _metrics(found), artifacts=files)

    def _try(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except ImamlError as error:  # the sweep itself is done and safe
            console.err.print(str(error), soft_wrap=True)


def _metrics(found: dict[str, Any] | None) -> dict[str, float]:
    """The best trial's validation and test, and how many trials ended how."""
    if found is None:
        return {}
    best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    test = found["test"] or {}
    metrics = {"best/trial": best["trial"], "best/val_accuracy": best["accuracy"], "best/val_ci95": best["ci95"]}
    metrics |= {"test/accuracy": test.get("accuracy"), "test/accuracy_ci95": test.get("ci95")}
    for status in ("finished", "stopped", "failed"):
        metrics[f"trials/{status}"] = sum(trial["status"] == status for trial in found["trials"])
    return {name: float(value) for name, value in metrics.items() if value is not None}
