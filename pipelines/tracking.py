"""The MLflow side of a run: what it is told at the beginning and at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imaml_dist.config.load import flatten
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.storage.local import without_secrets
from imaml_dist.tracking.mlflow_link import RunFacts
from imaml_dist.tracking.mlflow_model import QUERY_X, SUPPORT_X, SUPPORT_Y, ModelFacts
from imaml_dist.tracking.mlflow_parent import MlflowParent
from imaml_dist.tracking.mlflow_run import MlflowRun
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console
from pipelines.summary import versions

RESULTS = {
    "test/accuracy": "test_accuracy",
    "test/accuracy_ci95": "ci95",
    "test/accuracy_inductive": "test_accuracy_inductive",
    "test/accuracy_inductive_ci95": "ci95_inductive",
}
"""Names in MLflow of fields of `summary.json`."""


def mlflow_run(
    config: ExperimentConfig, run: RunDirectory, dataset: Dataset, parent: str | None = None, **tags: str
) -> MlflowRun:
    """The MLflow side of a run.

    Args:
        config: resolved configuration.
        run: its directory, begun.
        dataset: opened data set.
        parent: id of the MLflow run that this one is a child of, such as a sweep's.
        tags: further ones, such as the number of a trial.
    """
    facts = RunFacts(
        experiment=config.tracking.experiment or config.name,
        name=config.name if parent is None or config.name.endswith(run.path.name) else f"{config.name}/{run.path.name}",
        params=flatten(config),
        tags={**_tags(config, run.address), "resume_count": str(len(run.starts())), **tags},
        dataset={"name": dataset.index.name, "digest": dataset.index.fingerprint, "source": dataset.url},
        dataset_tags={"n_way": str(config.data.way), "k_shot": str(config.data.shot), "query": str(config.data.query)},
        files=[run.config_file],
        parent=parent,
    )
    home = None if run.home == run.path.resolve().parent else run.home  # a folder may lie in that of a sweep
    if "MLFLOW_TRACKING_URI" not in os.environ:
        run.home.mkdir(parents=True, exist_ok=True)
    return MlflowRun(run.path, run.metrics_file, facts, run.url, home)


def mlflow_parent(
    config: ExperimentConfig, folder: Path, params: Mapping[str, Any], files: Sequence[Path] = (), **tags: str
) -> MlflowParent:
    """The MLflow run above several runs whose directories lie in one folder.

    Args:
        config: what the runs have in common.
        folder: exists.
        params: what the whole is made of, flattened: a search space, or the number of seeds.
        files: such as the sweep's own configuration; sent when it begins.
        tags: further ones.
    """
    facts = RunFacts(
        experiment=config.tracking.experiment or config.name,
        name=folder.resolve().name,
        params=params,
        tags={**_tags(config, str(folder.resolve())), **tags},
        files=files,
    )
    return MlflowParent(folder, facts)


def finish_tracking(tracker: MlflowRun, run: RunDirectory, status: str, timeout: float = 20.0) -> None:
    """Send what is left of a run, its results and files, and note in the summary where it can be found.

    Raises:
        TrackingError: the server does not take everything.
    """
    facts = run.read_json(run.summary_file) if status == "FINISHED" else None
    results = {name: value for name, key in RESULTS.items() if (value := (facts or {}).get(key)) is not None}
    tags = {"resume_count": str(max(0, len(run.starts()) - 1))}
    files = [run.config_file, run.summary_file, run.evaluation_file, run.report_file]
    with tempfile.TemporaryDirectory() as folder:
        figures: list[Path] = []
        model = None
        if facts is not None:
            from imaml_dist.reporting.pictures import write_pictures

            figures = write_pictures(run.path, Path(folder))
            model = _model(run, facts, Path(folder))
        tracker.close(status, files, results, tags, timeout, figures, model)
    if facts is not None:
        run.write_json(run.summary_file, facts | {"mlflow": tracker.identity})
    run.share(run.summary_file, run.mlflow_file)
    if tracker.registered:
        console.out.print(tracker.registered, soft_wrap=True)


def _model(run: RunDirectory, facts: dict[str, Any], folder: Path) -> ModelFacts | None:
    """The best checkpoint, if it is to be registered."""
    config = run.config()
    name = config.tracking.registered
    if name is None:
        return None
    from imaml_dist.distributed.adapted import CODE, write_files
    from imaml_dist.reporting.reading import read_episode

    evaluation = run.read_json(run.evaluation_file)
    episode = read_episode(run.evaluation_file, evaluation)
    assert episode is not None, "a run that is to be registered is tested"
    height, width, channels = (int(size) for size in episode.support.shape[1:])
    tested_on = {
        "dataset_fingerprint": facts["dataset"]["fingerprint"],
        "way": str(facts["way"]),
        "shot": str(facts["shot"]),
        "test_query": str(evaluation["query"]),
    }
    found = versions()
    return ModelFacts(
        name=name,
        code=CODE,
        files=write_files(run, evaluation["step"], (channels, height, width), folder),
        image_shape=(height, width, channels),
        way=int(facts["way"]),
        example={SUPPORT_X: episode.support, SUPPORT_Y: _as_labels(episode.support_labels), QUERY_X: episode.query},
        step=int(evaluation["step"]),
        accuracy=float(facts["test_accuracy"]),
        tested_on=tested_on,
        tags={"algorithm": facts["algorithm"], "ci95": repr(facts["ci95"]), "params_sha256": facts["params_sha256"]},
        requirements=tuple(f"{package}=={found[package]}" for package in ("imaml_dist", "torch") if package in found),
    )


def _as_labels(labels: list[int]) -> Any:
    import numpy as np

    return np.asarray(labels, dtype=np.int64)


def _tags(config: ExperimentConfig, address: str) -> dict[str, str]:
    """Where something runs and on what; differs from start to start."""
    ray = os.environ.get("RAY_ADDRESS")
    found = {
        "algorithm": config.algorithm.kind,
        "run_directory": address,
        # What the operator of Kubernetes tells the pods of a Ray cluster, else the address, else this machine.
        "cluster": os.environ.get("RAY_CLUSTER_NAME") or (without_secrets(ray) if ray else platform.node()),
        "image": os.environ.get("IMAML_IMAGE"),
        "git_commit": _git_commit(),
        **{f"version.{name}": number for name, number in versions().items()},
    }
    return {key: value for key, value in found.items() if value}


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - constants
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
