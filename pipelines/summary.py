"""What is left of a finished run in numbers: `summary.json`, and the table that ends the command."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed.traffic import KEYS
from imaml_dist.errors import InputError
from imaml_dist.reporting.cautions import in_short
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.mlflow_run import MlflowRun, registered_as
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of
from pipelines import console


def summary(config: ExperimentConfig, run: RunDirectory, dataset: Dataset, tracker: MlflowRun | None) -> dict[str, Any]:
    """The facts of a finished run, as written to `summary.json`."""
    loaded = run.newest_checkpoint()
    assert loaded is not None, "a finished run has a checkpoint"
    tensors, facts = loaded
    evaluation = run.read_json(run.evaluation_file) if config.evaluate.tasks else None
    records = metrics_file.read(run.metrics_file)
    speeds = [r["tasks_per_second"] for r in records if r.get("tasks_per_second")]
    starts = run.starts()
    tested = {who: _accuracies(evaluation, who) for who in ("trained", "untrained")}
    return {
        "name": config.name,
        "algorithm": config.algorithm.kind,
        "dataset": {"name": dataset.index.name, "fingerprint": dataset.index.fingerprint},
        "way": config.data.way,
        "shot": config.data.shot,
        "meta_steps": facts["ledger"]["steps"],
        "best_step": facts["best"]["step"],
        "val_accuracy": facts["best"]["accuracy"] if facts["best"]["step"] >= 0 else None,
        "test_accuracy": tested["trained"][0],
        "ci95": tested["trained"][1],
        "test_accuracy_inductive": tested["trained"][2],
        "ci95_inductive": tested["trained"][3],
        "untrained_accuracy": tested["untrained"][0],
        "untrained_ci95": tested["untrained"][1],
        "untrained_accuracy_inductive": tested["untrained"][2],
        "untrained_ci95_inductive": tested["untrained"][3],
        "tasks_evaluated": evaluation["tasks"] if evaluation else 0,
        "seconds": facts["seconds"],
        "tasks_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "world_size": starts[-1]["world_size"],
        "restarts": len(starts) - 1,
        "skipped_tasks": len(facts["ledger"]["excluded"]),
        "skipped_steps": facts["ledger"]["steps"] - facts["updates"],
        "warm_start": _warm_start(config, starts),
        "ledger": {"tasks": facts["ledger"]["tasks"], "sha256": facts["ledger"]["digest"]},
        "params_sha256": sha256_of({n: t for n, t in tensors.items() if n.startswith("model.")}),
        "state_sha256": sha256_of(tensors),
        "storage": _storage(records),
        "versions": versions(),
        "environment": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name()
            if config.run.device == "cuda" and torch.cuda.is_available()  # else this is the head of a cluster
            else config.run.device,
        },
        "mlflow": tracker.identity if tracker is not None else None,
    }


def _accuracies(evaluation: Any, who: str) -> tuple[float | None, ...]:
    """Mean and interval, transductive and inductive; None where there is none."""
    part = (evaluation or {}).get(who) or {}
    return tuple(kind.get(key) for kind in (part, part.get("inductive") or {}) for key in ("mean", "ci95"))


def _warm_start(config: ExperimentConfig, starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the run began with, by the newest start that began at step 0."""
    noted = [start["warm_start"]["sha256"] for start in starts if start.get("warm_start")]
    return {"path": config.warm_start.path, "sha256": noted[-1]} if noted else None


def _storage(records: list[dict[str, Any]]) -> dict[str, float] | None:
    """What training asked of object storage, over all steps on record and all workers; None where it asked nothing."""
    totals = {key: sum(float(record.get(key) or 0) for record in records) for key in KEYS}
    return totals if any(totals.values()) else None


def _asked(storage: dict[str, float] | None) -> dict[str, str]:
    if storage is None:
        return {}
    retries, waited = storage["s3_retries"], storage["s3_seconds_waited"]
    again = f", {retries:.0f} times again after {waited:.1f} s of waiting" if retries else ""
    return {"object storage": f"{storage['s3_bytes'] / 1e6:.1f} MB in {storage['s3_requests']:.0f} requests{again}"}


def is_finished(config: ExperimentConfig, run: RunDirectory) -> bool:
    """Whether a run was trained, tested and reported on as its configuration says."""
    try:
        summary = run.read_json(run.summary_file)
        limit = config.run.max_seconds
        trained = summary["meta_steps"] >= config.run.steps or (limit is not None and summary["seconds"] >= limit)
        trained = trained or config.validation.on_plateau(summary["meta_steps"], summary["best_step"])
        whole = trained and summary["tasks_evaluated"] == config.evaluate.tasks
        if config.evaluate.tasks:
            whole = whole and run.read_json(run.evaluation_file)["query"] == config.evaluate.query
    except (InputError, KeyError, TypeError):  # a file is missing or cannot be read: it will be written again
        return False
    return bool(whole) and run.report_file.is_file()


def is_tracked(config: ExperimentConfig, run: RunDirectory) -> bool:
    """Whether MLflow knows a finished run, and its model, as far as the configuration asks.

    What a server was sent and did not take is for `imaml mlflow-sync`.
    """
    if not config.tracking.mlflow:
        return True
    known = run.read_json(run.summary_file).get("mlflow") is not None
    return known and config.tracking.registered in (None, registered_as(run.path))


def show_summary(run: RunDirectory) -> None:
    """The table that ends a run."""
    facts = run.read_json(run.summary_file)
    console.table(
        facts["name"],
        {
            "data": f"{facts['dataset']['name']}, {facts['way']}-way {facts['shot']}-shot",
            "algorithm": facts["algorithm"],
            f"test accuracy ({facts['tasks_evaluated']} tasks)": console.percent(facts["test_accuracy"], facts["ci95"]),
            "the same, inductive": console.percent(facts.get("test_accuracy_inductive"), facts.get("ci95_inductive")),
            "the initial network without meta-training": console.percent(
                facts["untrained_accuracy"], facts["untrained_ci95"]
            ),
            "the initial network, inductive": console.percent(
                facts.get("untrained_accuracy_inductive"), facts.get("untrained_ci95_inductive")
            ),
            "meta-steps": f"{facts['meta_steps']} in {facts['seconds']:.0f} s on {facts['world_size']} worker(s)",
            **_doubts(facts, run),
            "restarts": str(facts["restarts"]),
            "tasks per second": "-" if facts["tasks_per_second"] is None else f"{facts['tasks_per_second']:.1f}",
            **_asked(facts.get("storage")),
            "excluded tasks, skipped steps": f"{facts['skipped_tasks']}, {facts.get('skipped_steps', 0)}",
            "params sha256": facts["params_sha256"][:16],
            "report": f"{run.url}/{run.report_file.name}",
        },
        console.TWO_ACCURACIES if facts["test_accuracy"] is not None else "",
    )


def _doubts(facts: dict[str, Any], run: RunDirectory) -> dict[str, str]:
    if facts["algorithm"] != "imaml":
        return {}
    return {"is the implicit gradient one?": in_short(metrics_file.read(run.metrics_file))}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in ("imaml_dist", "torch", "ray", "mlflow", "numpy", "webdataset"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
