"""The Ray backend: every Ray Train worker is the keeper of one rank.

Ray places the keepers, tells them how many they are, and starts all of them again when a node or a keeper is lost; the loss of
a rank's process the keepers mend among themselves (`keeper`). Ray keeps nothing of ours: checkpoints, metrics and the reason
of a failure lie in the run directory: in object storage, or in a folder that all nodes see under the same path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imaml_dist import errors
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.ray_worker import keep_rank
from imaml_dist.distributed.stop import Stop
from imaml_dist.errors import ImamlError, TrainingError
from imaml_dist.storage.local import local_path
from imaml_dist.storage.opening import S3
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

RESIZE_S = 60.0
"""Between two looks for nodes that have come, each of which starts all workers again from the newest checkpoint."""

GROUP_START_S = 30
"""For Ray to find room for all workers; where fewer will do, it then goes on with those that have come."""

ROOM_S = 600
"""For a node to come in the place of a lost one that the run cannot do without."""


def train_on_ray(config: ExperimentConfig, run: RunDirectory) -> Stop:
    """Train on the Ray cluster this process is connected to.

    Call it outside of the main thread if Ctrl-C shall end with a checkpoint: Ray Train takes over SIGINT otherwise.

    Args:
        config: resolved configuration.
        run: a begun run directory, in object storage or on a file system that all nodes share.

    Returns:
        Why the loop ended.

    Raises:
        ImamlError: what a worker raised, as it raised it.
        TrainingError: Ray itself gave up.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(int(max(60.0, config.run.collective_timeout))))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROUP_START_S))
    attempts = int(ROOM_S / max(1.0, float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])))
    from ray.exceptions import RayError
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from imaml_dist.distributed.ray_room import Patience

    class SharedGpus(Backend):  # type: ignore[misc]
        """Workers of one node see each other's GPUs, as nccl wishes."""

        share_cuda_visible_devices = True

    class Sharing(BackendConfig):  # type: ignore[misc]
        backend_cls = SharedGpus

    fewest, most = config.run.bounds
    cuda = config.run.device == "cuda"
    scratch, starts = run.ray_scratch.resolve(), len(run.starts())

    def fit() -> Any:
        return DataParallelTrainer(
            keep_rank,
            train_loop_config={
                "config": config.model_dump(by_alias=True) | _absolute(config),
                "run": run.address,
                "import_path": [os.getcwd()],
                "starts": starts,
            },
            backend_config=Sharing() if cuda else BackendConfig(),
            scaling_config=ScalingConfig(
                num_workers=fewest if fewest == most else (fewest, most),
                elastic_resize_monitor_interval_s=RESIZE_S,
                use_gpu=cuda,
                resources_per_worker={
                    "CPU": config.run.threads,
                    **({"GPU": config.run.gpus_per_worker} if cuda else {}),
                },
            ),
            run_config=RunConfig(
                name=f"start-{len(run.starts()):04d}-{os.getpid()}",
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=attempts),
                callbacks=[Patience(fewest, ROOM_S, run.stop_file.resolve())],
            ),
        ).fit()

    try:
        result = _fitted(fit, run, TrainingFailedError)
    except (TrainingFailedError, RayError) as error:  # the latter if Ray's controller of the run is lost
        raise_failure(run)
        if isinstance(error, TrainingFailedError) and run.stop_file.exists():  # there was no worker to hear of it
            return Stop.INTERRUPTED
        newest = run.newest_step()
        raise TrainingError(
            f"Ray gave up ({errors.brief(error)}); the last good checkpoint is of step {newest}; see the worker logs of Ray, then run "
            "the same command again to resume"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(result.return_value, list):
        raise _told(*result.return_value)
    raise_failure(run)
    return Stop(int(result.return_value))


def _fitted(fit: Callable[[], Any], run: RunDirectory, failed: type[Exception]) -> Any:
    """Fit again after a failure that came after progress: Ray counts the groups it could not start over the whole run, and so would
    forgive a long run no more of them than a short one."""
    while True:
        before = metrics_file.reached(run.metrics_file)
        try:
            return fit()
        except failed:
            raise_failure(run)
            run.collect()
            if metrics_file.reached(run.metrics_file) <= before or run.stop_file.exists():
                raise


def raise_failure(run: RunDirectory) -> None:
    """Raise in this process what a worker has left in the run directory, if anything."""
    failure = run.failure()
    if failure is not None:
        raise _told(str(failure["type"]), str(failure["message"]))


def _told(kind: str, message: str) -> ImamlError:
    found = getattr(errors, kind, None)
    return (found if isinstance(found, type) and issubclass(found, ImamlError) else ImamlError)(message)


def _absolute(config: ExperimentConfig) -> dict[str, Any]:
    """The sections that hold paths, with paths that mean the same in every working directory."""
    data, warm, frozen = config.data.model_dump(), config.warm_start.model_dump(), config.validation.model_dump()
    if config.warm_start.path is not None:
        warm |= {"path": str(local_path(config.warm_start.path).resolve())}
    storage = config.storage.model_dump()
    if config.storage.cache is not None:
        storage |= {"cache": str(Path(config.storage.cache).resolve())}
    if not config.data.url.startswith(S3):
        data |= {"url": str(local_path(config.data.url).resolve())}
    if config.validation.manifest is not None and not config.validation.manifest.startswith(S3):
        frozen |= {"manifest": str(local_path(config.validation.manifest).resolve())}
    return {"data": data, "storage": storage, "warm_start": warm, "validate": frozen}
