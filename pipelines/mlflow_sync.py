"""`imaml mlflow-sync`: send what a run's metrics file still holds for MLflow, and say there how the run ended."""

from __future__ import annotations

import os
from pathlib import Path

from imaml_dist.distributed.build import open_dataset
from imaml_dist.errors import InputError
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console
from pipelines.summary import is_finished
from pipelines.tracking import finish_tracking, mlflow_run

ANSWER_S = 60
"""For a server to answer a request where nothing else waits; a training run's own is given five."""


def sync_patiently(path: str | Path) -> None:
    """`sync` for a user who waits: a server that is busy may take its time, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))
    sync(path)


def sync(path: str | Path, say: bool = True, seen: str | None = None) -> None:
    """Send the remaining metrics and the run's files, and close the MLflow run.

    A run whose process was killed cannot have said so itself: it becomes KILLED here, or FAILED if it noted that it did, and
    RUNNING again when it is resumed.

    Args:
        path: run directory.
        say: print what became of it.
        seen: how it ended, as whoever started it saw; what the run itself said or noted before its end goes first.

    Raises:
        InputError: no such run, or it is being trained.
        TrackingError: the server cannot be reached.
    """
    run = open_run(path)
    run.collect()
    config = run.config()
    with run.driving() as held:
        if not held:
            raise InputError(f"{path} is being trained, which sends its metrics as it goes on; wait for its end")
        tracker = mlflow_run(config, run, open_dataset(config))
        status = "FINISHED" if is_finished(config, run) else tracker.intended or seen or _noted(run)
        finish_tracking(tracker, run, status)
    if say:
        console.out.print(f"MLflow run {tracker.identity}: {status}", soft_wrap=True)


def _noted(run: RunDirectory) -> str:
    """How a run ended that said nothing to MLflow."""
    return "FAILED" if run.failure_file.is_file() else "KILLED"
