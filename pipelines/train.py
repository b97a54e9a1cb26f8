"""`imaml train`: meta-train, meta-test, summarise, report; the same command again resumes."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from imaml_dist.config.load import flatten, load_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed.build import make_learner, make_source, resolve
from imaml_dist.distributed.worker import Stop
from imaml_dist.errors import InputError, TrackingError
from imaml_dist.storage.local import exclusive
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.metrics_file import Follower
from imaml_dist.tracking.mlflow_run import MlflowRun, RunFacts
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of
from pipelines import console

POLL_S = 0.2


def train(config_path: Path, overrides: Sequence[str], run_dir: Path | None, fresh: bool) -> bool:
    """Train as a configuration file says.

    Returns:
        True when the run is finished; False when it was interrupted, with a checkpoint written.

    Raises:
        ImamlError: see the exit codes in `imaml_dist.errors`.
    """
    sys.path.insert(0, os.getcwd())  # a user's own model factory lies beside their configuration
    config = resolve(load_config(config_path, overrides), cuda=torch.cuda.is_available())
    run = RunDirectory(run_dir or Path("runs") / config.name)
    dataset = _preflight(config)
    run.check_usable()
    run.path.mkdir(parents=True, exist_ok=True)
    with exclusive(run.driver_lock) as held:
        if not held:
            raise InputError(
                f"{run.path} is being trained by another imaml train; wait for it, or choose another --run-dir"
            )
        return _train_run(config, run, dataset, fresh)


def _train_run(config: ExperimentConfig, run: RunDirectory, dataset: Dataset, fresh: bool) -> bool:
    run.begin(config, fresh=fresh)
    if not fresh and _is_finished(config, run):
        console.out.print(f"{run.path} is finished; --fresh starts over, a larger run.steps goes on")
        show_summary(run)
        return True
    tracker = mlflow_run(config, run, dataset) if config.tracking.mlflow else None
    if tracker is not None:
        tracker.start()
    status = "FAILED"
    try:
        stop = _train_and_follow(config, run)
        status = "KILLED" if stop is Stop.INTERRUPTED else "FINISHED"
        if stop is not Stop.INTERRUPTED:
            run.write_json(run.summary_file, summary(config, run, dataset, tracker))
            from imaml_dist.reporting.report import write_report

            write_report(run.path)
    finally:
        if tracker is not None:
            _close(tracker, run, status)
    if stop is Stop.INTERRUPTED:
        console.err.print(
            f"interrupted; the checkpoint is written, the same command goes on from it: {run.path}", soft_wrap=True
        )
        return False
    show_summary(run)
    return True


def _preflight(config: ExperimentConfig) -> Dataset:
    """Find what is wrong with data, episodes and model before anything is started."""
    dataset = Dataset(config.data.url)
    for split, wanted in (("train", True), ("val", config.validation.tasks > 0), ("test", config.evaluate.tasks > 0)):
        if wanted:
            make_source(config, dataset, split)
    make_learner(config, dataset.index.image_shape)
    return dataset


def _is_finished(config: ExperimentConfig, run: RunDirectory) -> bool:
    summary = run.read_json(run.summary_file)
    if summary is None or not run.report_file.is_file():
        return False
    limit = config.run.max_seconds
    trained = summary["meta_steps"] >= config.run.steps or (limit is not None and summary["seconds"] >= limit)
    return trained and summary["tasks_evaluated"] == config.evaluate.tasks


@dataclass
class _Backend:
    """The training loop in a thread of its own: the main thread follows it and hears signals."""

    run: Callable[[], Stop]
    result: list[Stop] = field(default_factory=list)
    error: list[BaseException] = field(default_factory=list)

    def __call__(self) -> None:
        try:
            self.result.append(self.run())
        except BaseException as error:  # handed to the main thread, which raises it
            self.error.append(error)


def _train_and_follow(config: ExperimentConfig, run: RunDirectory) -> Stop:
    with ExitStack() as stack:
        if config.run.backend == "ray":
            from cluster.session import ray_session
            from imaml_dist.distributed.ray_train import train_on_ray

            cuda = config.run.device == "cuda"
            console.out.print(f"starting {config.run.workers} Ray workers")
            stack.enter_context(ray_session(config.run.workers * config.run.threads, config.run.workers if cuda else 0))
            backend = _Backend(lambda: train_on_ray(config, run))
        else:
            from imaml_dist.distributed.local import train_local

            backend = _Backend(lambda: train_local(config, run))
        stack.enter_context(_stop_on_signals(run))
        show = stack.enter_context(console.progress(f"meta-training {config.name}"))
        thread = threading.Thread(target=backend, name="training", daemon=True)
        follower, last = Follower(run.metrics_file), 0
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            for record in follower.poll():
                last = record["step"] + 1
                show(last, config.run.steps, console.step_remark(record))
    if backend.error:
        raise backend.error[0]
    return backend.result[0]


@contextmanager
def _stop_on_signals(run: RunDirectory) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop for a checkpoint and an end; a second one is obeyed at once."""

    def handle(number: int, frame: object) -> None:
        if run.stop_file.exists():
            raise KeyboardInterrupt
        console.err.print("stopping after this step with a checkpoint; once more to stop at once")
        run.request_stop()

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def summary(config: ExperimentConfig, run: RunDirectory, dataset: Dataset, tracker: MlflowRun | None) -> dict[str, Any]:
    """The facts of a finished run, as written to `summary.json`."""
    loaded = checkpoints.load_newest(run.checkpoints)
    assert loaded is not None, "a finished run has a checkpoint"
    tensors, facts = loaded
    evaluation = run.read_json(run.evaluation_file) if config.evaluate.tasks else None
    records = metrics_file.read(run.metrics_file)
    speeds = [r["tasks_per_second"] for r in records if r.get("tasks_per_second")]
    starts = run.starts()
    return {
        "name": config.name,
        "algorithm": config.algorithm.kind,
        "dataset": {"name": dataset.index.name, "fingerprint": dataset.index.fingerprint},
        "way": config.data.way,
        "shot": config.data.shot,
        "meta_steps": facts["ledger"]["steps"],
        "best_step": facts["best"]["step"],
        "val_accuracy": facts["best"]["accuracy"] if facts["best"]["step"] >= 0 else None,
        "test_accuracy": evaluation["trained"]["mean"] if evaluation else None,
        "ci95": evaluation["trained"]["ci95"] if evaluation else None,
        "untrained_accuracy": evaluation["untrained"]["mean"] if evaluation else None,
        "untrained_ci95": evaluation["untrained"]["ci95"] if evaluation else None,
        "tasks_evaluated": evaluation["tasks"] if evaluation else 0,
        "seconds": facts["seconds"],
        "tasks_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "world_size": starts[-1]["world_size"],
        "restarts": len(starts) - 1,
        "skipped_tasks": len(facts["ledger"]["excluded"]),
        "ledger": {"tasks": facts["ledger"]["tasks"], "sha256": facts["ledger"]["digest"]},
        "params_sha256": sha256_of({n: t for n, t in tensors.items() if n.startswith("model.")}),
        "state_sha256": sha256_of(tensors),
        "versions": _versions(),
        "environment": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": config.run.device if config.run.device == "cpu" else torch.cuda.get_device_name(),
        },
        "mlflow": tracker.identity if tracker is not None else None,
    }


def show_summary(run: RunDirectory) -> None:
    """The table that ends a run."""
    facts = run.read_json(run.summary_file)
    console.table(
        facts["name"],
        {
            "data": f"{facts['dataset']['name']}, {facts['way']}-way {facts['shot']}-shot",
            "algorithm": facts["algorithm"],
            f"test accuracy ({facts['tasks_evaluated']} tasks)": console.percent(facts["test_accuracy"], facts["ci95"]),
            "the same network without meta-training": console.percent(
                facts["untrained_accuracy"], facts["untrained_ci95"]
            ),
            "meta-steps": f"{facts['meta_steps']} in {facts['seconds']:.0f} s on {facts['world_size']} worker(s)",
            "restarts": str(facts["restarts"]),
            "tasks per second": "-" if facts["tasks_per_second"] is None else f"{facts['tasks_per_second']:.1f}",
            "excluded tasks": str(facts["skipped_tasks"]),
            "params sha256": facts["params_sha256"][:16],
            "report": str(run.report_file),
        },
    )


def mlflow_run(config: ExperimentConfig, run: RunDirectory, dataset: Dataset) -> MlflowRun:
    """The MLflow side of a run."""
    facts = RunFacts(
        experiment=config.tracking.experiment or config.name,
        name=config.name,
        params=flatten(config),
        tags={
            "algorithm": config.algorithm.kind,
            "run_directory": str(run.path.resolve()),
            **{f"version.{name}": number for name, number in _versions().items()},
            **({"git_commit": commit} if (commit := _git_commit()) else {}),
        },
        dataset={"name": dataset.index.name, "digest": dataset.index.fingerprint, "source": dataset.url},
        dataset_tags={"n_way": str(config.data.way), "k_shot": str(config.data.shot), "query": str(config.data.query)},
    )
    return MlflowRun(run.path, run.metrics_file, facts)


def _close(tracker: MlflowRun, run: RunDirectory, status: str) -> None:
    results: dict[str, float] = {}
    if status == "FINISHED":
        facts = run.read_json(run.summary_file)
        if facts["test_accuracy"] is not None:
            results = {"test/accuracy": facts["test_accuracy"], "test/accuracy_ci95": facts["ci95"]}
    tags = {"resume_count": str(max(0, len(run.starts()) - 1))}
    files = [run.config_file, run.summary_file, run.evaluation_file, run.report_file]
    try:
        tracker.close(status, files, results, tags)
    except TrackingError as error:  # the run itself is done and safe; the user is told how to send the rest
        console.err.print(str(error), soft_wrap=True)
    if status == "FINISHED":
        run.write_json(run.summary_file, run.read_json(run.summary_file) | {"mlflow": tracker.identity})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("imaml_dist", "torch", "ray", "mlflow", "numpy", "webdataset"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - constants
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
