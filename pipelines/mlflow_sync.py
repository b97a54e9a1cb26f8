"""`imaml mlflow-sync`: send what a run's metrics file still holds for MLflow."""

from __future__ import annotations

from pathlib import Path

from imaml_dist.distributed.build import open_dataset
from imaml_dist.errors import InputError
from imaml_dist.training.remote_run import open_run
from pipelines import console
from pipelines.tracking import finish_tracking, mlflow_run


def sync(path: str | Path) -> None:
    """Send the remaining metrics and the run's files, and close the MLflow run.

    Raises:
        InputError: no such run, or it is not finished.
        TrackingError: the server cannot be reached.
    """
    run = open_run(path)
    run.collect()
    config = run.config()
    if run.read_json(run.summary_file) is None:
        raise InputError(f"{path} is not finished (no summary.json); `imaml train` sends its metrics as it goes on")
    tracker = mlflow_run(config, run, open_dataset(config))
    finish_tracking(tracker, run, "FINISHED")
    console.out.print(f"MLflow run {tracker.identity}")
