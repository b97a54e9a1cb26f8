"""`imaml train`: meta-train, meta-test, summarise, report; the same command again resumes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.load import load_config
from imaml_dist.config.model import UserModelConfig
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed.build import (
    make_learner,
    make_source,
    make_validation_source,
    open_dataset,
    resolve,
    storage_options,
)
from imaml_dist.distributed.stop import Stop
from imaml_dist.errors import InputError, LossError, ModelError, StorageError, TrackingError, brief
from imaml_dist.tasks.episode import TaskSource
from imaml_dist.tracking.metrics_file import Follower
from imaml_dist.tracking.mlflow_run import MlflowRun
from imaml_dist.training import warm_start
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console, kernels
from pipelines.background import Background
from pipelines.profile import show_profile
from pipelines.signals import on_signals
from pipelines.summary import is_finished, is_tracked, show_summary, summary
from pipelines.tracking import finish_tracking, mlflow_run

POLL_S = 0.5


def train(
    config_path: Path, overrides: Sequence[str], run_dir: str | Path | None, fresh: bool, parent: str | None = None
) -> bool:
    """Train as a configuration file says.

    Args:
        config_path: configuration file.
        overrides: `section.field=value`.
        run_dir: run directory; `runs/<name>` if None.
        fresh: delete an earlier run there.
        parent: id of the MLflow run that this one is a child of.

    Returns:
        True when the run is finished; False when it was interrupted, with a checkpoint written.

    Raises:
        ImamlError: see the exit codes in `imaml_dist.errors`.
    """
    sys.path.insert(0, os.getcwd())  # a user's own model factory lies beside their configuration
    asked = load_config(config_path, overrides)
    dataset = open_dataset(asked)  # first, for kernels take long to compile
    config = resolve(asked, cuda=torch.cuda.is_available() or gpus_elsewhere(asked), native=kernels.usable)
    run = open_run(run_dir or Path("runs") / config.name, storage_options(config))
    _preflight(config, dataset, run, fresh)
    run.check_usable()
    with run.driving() as held:
        if not held:
            raise InputError(
                f"{run.url} is being trained by another imaml train; wait for it, or choose another --run-dir"
            )
        return _train_run(config, run, dataset, fresh, parent)


def _train_run(config: ExperimentConfig, run: RunDirectory, dataset: Dataset, fresh: bool, parent: str | None) -> bool:
    run.begin(config, fresh=fresh)
    if not fresh and is_finished(config, run):
        console.out.print(f"{run.url} is finished; --fresh starts over, a larger run.steps goes on", soft_wrap=True)
        if not is_tracked(config, run):
            _close(mlflow_run(config, run, dataset, parent), run, "FINISHED")
        show_summary(run)
        return True
    run.withdraw_results()
    tracker = mlflow_run(config, run, dataset, parent) if config.tracking.mlflow else None
    if tracker is not None:
        tracker.start()
    status = "FAILED"
    try:
        stop = _train_and_follow(config, run)
        run.collect()
        status = "KILLED" if stop is Stop.INTERRUPTED else "FINISHED"
        if stop is not Stop.INTERRUPTED:
            run.write_json(run.summary_file, summary(config, run, dataset, tracker))
            from imaml_dist.reporting.report import write_report

            write_report(run.path)
            run.share(run.summary_file, run.report_file)
    finally:
        if tracker is not None:
            _close(tracker, run, status)
    if stop is Stop.INTERRUPTED:
        console.err.print(f"interrupted; the same command goes on from the last checkpoint: {run.url}", soft_wrap=True)
        return False
    if config.run.profile:
        show_profile(run)
    show_summary(run)
    return True


def _preflight(config: ExperimentConfig, dataset: Dataset, run: RunDirectory, fresh: bool) -> None:
    """Find what is wrong with episodes, model and warm start before anything is started."""
    make_source(config, dataset, "train")
    make_validation_source(config, dataset)
    if config.evaluate.tasks:
        make_source(config, dataset, "test")
    learner = make_learner(here(config), dataset.index.image_shape)
    if isinstance(config.model, UserModelConfig) or config.loss != "cross_entropy":
        _try_model(config, learner, make_source(config, dataset, "train"))
    source = config.warm_start
    if source.path is not None and (fresh or not run.checkpoint_steps()):  # a resumed run needs it no more
        warm_start.check_outside(source.path, run.path)
        warm_start.load_into(learner.model, source.path, source.skip)
    dataset.close()  # the workers open it for themselves; here only its index is of use


def gpus_elsewhere(config: ExperimentConfig, *, trial: bool = False) -> bool:
    """Whether GPUs are asked of a cluster, whose head, where this command runs, need have none; the session looks whether it has them.

    Args:
        config: of a run.
        trial: it is a sweep's, which is a process on the cluster with either backend.
    """
    return config.run.device == "cuda" and (trial or config.run.backend == "ray") and "RAY_ADDRESS" in os.environ


def here(config: ExperimentConfig) -> ExperimentConfig:
    """The same on what this machine has."""
    if config.run.device == "cpu" or torch.cuda.is_available():
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})


def _try_model(config: ExperimentConfig, learner: MetaLearner, source: TaskSource) -> None:
    """Two tasks through a user's network and loss: what does not fit must be known before workers start."""
    episodes = source.episodes(0, range(2)).to(next(learner.model.parameters()).device)
    try:
        learner.preflight(episodes)
        learner.task_gradients(episodes)
    except ModelError as error:
        raise ModelError(f"model.kind: {error}") from error
    except LossError as error:
        raise LossError(f"{'model.kind' if config.loss == 'cross_entropy' else 'loss'}: {error}") from error
    except Exception as error:  # it is the user's code, and may raise anything
        raise ModelError(
            f"model.kind: the network cannot be meta-trained ({brief(error)}); it must map float32 images [n, C, H, W] to one logit "
            "per class [n, N], and be twice differentiable"
        ) from error


def _train_and_follow(config: ExperimentConfig, run: RunDirectory) -> Stop:
    exported = None
    with ExitStack() as stack:
        if config.run.backend == "ray":
            from cluster.metrics import RunMetrics
            from cluster.resources import Needs, check_room
            from cluster.session import ray_session
            from imaml_dist.distributed.ray_train import train_on_ray

            cuda = config.run.device == "cuda"
            fewest, most = config.run.bounds
            console.out.print(f"starting {most if fewest == most else f'{fewest} to {most}'} Ray workers")
            stack.enter_context(ray_session(fewest * config.run.threads))
            check_room(Needs(fewest, most, config.run.threads, config.run.gpus_per_worker if cuda else 0.0))
            training = Background("training", lambda: train_on_ray(config, run))
            exported = RunMetrics(config.name)
        else:
            from imaml_dist.distributed.local import train_local

            training = Background("training", lambda: train_local(config, run))
        stack.enter_context(run.following())
        stack.enter_context(_stop_on_signals(run))
        show = stack.enter_context(console.progress(f"meta-training {config.name}"))
        follower, starts, began = Follower(run.metrics_file), len(run.starts()), time.time()
        training.start()
        while training.is_alive():
            training.join(POLL_S)
            run.confirm_driving()
            for start in run.starts()[starts:]:
                starts += 1
                if exported is not None:
                    exported.restarted(starts - 1)
                if start.get("after"):
                    console.err.print(f"{start['after']}; going on from {_origin(start)}", soft_wrap=True)
            records = follower.poll()
            for record in records:
                if exported is not None and record["time"] >= began:  # an earlier command has told of the others
                    exported.observe(record)
            if records:  # the newest alone: a run that goes on is not shown at its first step
                show(records[-1]["step"] + 1, config.run.steps, console.step_remark(records[-1]))
        return training.outcome()


def _origin(start: dict[str, Any]) -> str:
    """Where a start took the state from."""
    remembered = start.get("from") == "memory"
    return f"step {start['step']} on {start['world_size']} worker(s), {'as remembered' if remembered else 'by the checkpoint'}"


@contextmanager
def _stop_on_signals(run: RunDirectory) -> Iterator[None]:
    """A first signal asks the loop for a checkpoint and an end."""

    def ask() -> None:
        console.err.print("stopping as soon as the state can be saved; once more to stop at once")
        run.request_stop()

    try:
        with on_signals(ask, "the same command goes on from the last checkpoint"):
            yield
    finally:
        run.withdraw_stop()


def _close(tracker: MlflowRun, run: RunDirectory, status: str) -> None:
    if tracker.trouble is not None:
        console.err.print(f"MLflow: {tracker.trouble}; trying once more", soft_wrap=True)
    try:
        finish_tracking(tracker, run, status)
    except (
        TrackingError,
        StorageError,
    ) as error:  # the run itself is done and safe; the user is told how to send the rest
        console.err.print(str(error), soft_wrap=True)
