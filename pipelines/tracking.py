"""The MLflow side of a run: what it is told at the beginning and at the end."""

from __future__ import annotations

import subprocess

from imaml_dist.config.load import flatten
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.tracking.mlflow_run import MlflowRun, RunFacts
from imaml_dist.training.run_directory import RunDirectory
from pipelines.summary import versions


def mlflow_run(config: ExperimentConfig, run: RunDirectory, dataset: Dataset) -> MlflowRun:
    """The MLflow side of a run."""
    facts = RunFacts(
        experiment=config.tracking.experiment or config.name,
        name=config.name,
        params=flatten(config),
        tags={
            "algorithm": config.algorithm.kind,
            "run_directory": run.address,
            **{f"version.{name}": number for name, number in versions().items()},
            **({"git_commit": commit} if (commit := _git_commit()) else {}),
        },
        dataset={"name": dataset.index.name, "digest": dataset.index.fingerprint, "source": dataset.url},
        dataset_tags={"n_way": str(config.data.way), "k_shot": str(config.data.shot), "query": str(config.data.query)},
    )
    run.home.mkdir(parents=True, exist_ok=True)
    return MlflowRun(run.path, run.metrics_file, facts, run.url, run.home)


def finish_tracking(tracker: MlflowRun, run: RunDirectory, status: str) -> None:
    """Send what is left of a run, its results and files, and note in the summary where it can be found.

    Raises:
        TrackingError: the server does not take everything.
    """
    facts = run.read_json(run.summary_file) if status == "FINISHED" else None
    results: dict[str, float] = {}
    if facts is not None and facts["test_accuracy"] is not None:
        keys = {
            "test/accuracy": "test_accuracy",
            "test/accuracy_ci95": "ci95",
            "test/accuracy_inductive": "test_accuracy_inductive",
            "test/accuracy_inductive_ci95": "ci95_inductive",
        }
        results = {name: value for name, key in keys.items() if (value := facts.get(key)) is not None}
    tags = {"resume_count": str(max(0, len(run.starts()) - 1))}
    files = [run.config_file, run.summary_file, run.evaluation_file, run.report_file]
    tracker.close(status, files, results, tags)
    if facts is not None:
        run.write_json(run.summary_file, facts | {"mlflow": tracker.identity})
    run.share(run.summary_file, run.mlflow_file)


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - constants
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
