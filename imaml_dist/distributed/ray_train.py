"""The Ray backend: the training loop in Ray Train actors, restarted from the newest checkpoint when one is lost.

Ray starts the workers, connects them (gloo on CPUs, nccl on GPUs) and starts the whole group again after a loss. It
keeps nothing of ours: checkpoints, metrics and the reason of a failure lie in the run directory, which all nodes must
see under the same path.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from imaml_dist import errors
from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.reduction import ProcessGroup
from imaml_dist.distributed.worker import Stop, Worker
from imaml_dist.errors import ImamlError, TrainingError
from imaml_dist.storage.local import local_path
from imaml_dist.storage.opening import S3
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory

MAX_RESTARTS = 8
"""Losses of workers or nodes that one call survives."""

COLLECTIVE_TIMEOUT_S = 120


def train_on_ray(config: ExperimentConfig, run: RunDirectory) -> Stop:
    """Train on the Ray cluster this process is connected to.

    Call it outside of the main thread if Ctrl-C shall end with a checkpoint: Ray Train takes over SIGINT otherwise.

    Args:
        config: resolved configuration.
        run: a begun run directory on storage that all nodes share.

    Returns:
        Why the loop ended.

    Raises:
        ImamlError: what a worker raised, as it raised it.
        TrainingError: workers were lost more often than `MAX_RESTARTS` times.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    cuda = config.run.device == "cuda"
    scratch = run.ray_scratch.resolve()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(by_alias=True) | _absolute(config),
            "run": str(run.path.resolve()),
            "import_path": os.getcwd(),
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.run.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": config.run.threads, **({"GPU": 1} if cuda else {})},
        ),
        run_config=RunConfig(
            name=f"start-{len(run.starts()):04d}-{os.getpid()}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=5),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise_failure(run)
        newest = max(checkpoints.steps(run.checkpoints), default=None)
        raise TrainingError(
            f"Ray gave up after {MAX_RESTARTS} restarts of the workers ({type(error).__name__}); the last good checkpoint is of step "
            f"{newest}; see the worker logs of Ray, then run the same command again to resume"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    raise_failure(run)
    return Stop(int(result.return_value))


def raise_failure(run: RunDirectory) -> None:
    """Raise in this process what a worker has left in the run directory, if anything."""
    failure = run.read_json(run.failure_file)
    if failure is not None:
        kind = getattr(errors, str(failure["type"]), ImamlError)
        raise kind(str(failure["message"]))


def _worker(payload: dict[str, Any]) -> int:
    """What each Ray actor runs."""
    run = RunDirectory(Path(payload["run"]))
    if run.failure_file.exists():  # Ray restarts the group after any error; one that will only repeat itself ends here
        return int(Stop.INTERRUPTED)
    sys.path.insert(0, payload["import_path"])
    try:
        return int(Worker(build_config(payload["config"]), run, ProcessGroup()).run_to_end())
    except ImamlError as error:
        if type(error) is not ImamlError:  # the bare root only says that rank 0 gave up, whose own reason must stand
            run.write_json(run.failure_file, {"type": type(error).__name__, "message": str(error)})
        raise


def _absolute(config: ExperimentConfig) -> dict[str, Any]:
    """The sections that hold paths, with paths that mean the same in every working directory."""
    data, warm = config.data.model_dump(), config.warm_start.model_dump()
    if config.warm_start.path is not None:
        warm |= {"path": str(local_path(config.warm_start.path).resolve())}
    storage = config.storage.model_dump()
    if config.storage.cache is not None:
        storage |= {"cache": str(Path(config.storage.cache).resolve())}
    if not config.data.url.startswith(S3):
        data |= {"url": str(local_path(config.data.url).resolve())}
    return {"data": data, "storage": storage, "warm_start": warm}
