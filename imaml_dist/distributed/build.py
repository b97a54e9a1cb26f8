"""Configuration -> the objects of a run: model, algorithm, learner, data; the same on every worker."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.algorithms.linear import ConjugateGradient, Direct, Dual, Nystrom
from imaml_dist.algorithms.loss import Loss, cross_entropy
from imaml_dist.config.model import Conv4Config, MLPConfig, ModelConfig, UserModelConfig
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.core.curvature import MAX_BYTES
from imaml_dist.data.ahead import Ahead
from imaml_dist.data.augment import Augmentation
from imaml_dist.data.dataset import CacheOptions, Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.data.frozen import FrozenTasks, read_manifest
from imaml_dist.distributed.build_algorithm import make_algorithm
from imaml_dist.errors import ConfigError, brief
from imaml_dist.kernels import native as kernels
from imaml_dist.kernels.memory import keep_freed_memory
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.mlp import MLP
from imaml_dist.models.part import UnknownParameterError
from imaml_dist.storage.options import StorageOptions
from imaml_dist.tasks.episode import TaskSource

OPEN_FILES = 1 << 16
"""As many of a data set's blocks as a worker may keep open; a quarter of what the process may is used."""


def resolve(config: ExperimentConfig, *, cuda: bool, native: Callable[[], bool] = kernels.usable) -> ExperimentConfig:
    """Replace every `auto` by what it means here, so that the run's configuration says what it did.

    Args:
        config: as the user wrote it.
        cuda: whether the workers can have a GPU.
        native: tells whether our own CPU kernels can be compiled here; asked only where they would be used.

    Raises:
        ConfigError: a GPU, or what only a GPU has, is asked for and there is none; native execution in bfloat16; or several
            workers with a part of a GPU each.
    """
    run = config.run
    device = run.device if run.device != "auto" else ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise ConfigError("run.device: cuda given, but no GPU is visible here; use cpu or auto")
    if device == "cuda" and run.gpus_per_worker < 1 and run.bounds[1] > 1:
        raise ConfigError(
            f"run.gpus_per_worker: {run.gpus_per_worker} given with {run.bounds[1]} workers, but two workers of a run cannot talk to each "
            "other on one GPU; use run.workers: 1, or a whole GPU for each"
        )
    if run.precision == "tf32" and device != "cuda":
        raise ConfigError("run.precision: tf32 given, but only GPUs have it; use float32 or bfloat16")
    execution, rounded = run.execution, run.precision == "bfloat16"
    if execution == "native" and rounded:
        raise ConfigError(
            "run.execution: native given, but its kernels have no bfloat16; use vmap or loop, or run.precision: float32"
        )
    if execution == "auto":
        convolutional = not isinstance(config.model, MLPConfig)
        execution = "native" if device == "cpu" and convolutional and not rounded and native() else "vmap"
    return config.model_copy(update={"run": run.model_copy(update={"device": device, "execution": execution})})


def prepare_process(config: ExperimentConfig) -> None:
    """Set up this process so that equal work gives equal bits (threads, algorithms, TF32 only if asked for), memory is used again, and
    a data set's files may be open at once."""
    keep_freed_memory()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most > files:
        enough = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, enough), most))
    torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.precision == "tf32"


def make_model(model: ModelConfig, image_shape: tuple[int, int, int], way: int, seed: int) -> nn.Module:
    """The network, initialised from `seed` alone; the global random state is left as it was.

    Raises:
        ConfigError: the network does not fit the images, or a user's factory cannot be imported or called.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if isinstance(model, Conv4Config):
                return Conv4(image_shape, way, model.channels, model.pooled, model.activation, model.softplus_beta)
            if isinstance(model, MLPConfig):
                return MLP(image_shape, way, model.hidden, model.activation, model.softplus_beta)
            return _from_factory(model, image_shape, way)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error


def _from_factory(model: UserModelConfig, image_shape: tuple[int, int, int], way: int) -> nn.Module:
    module_name, _, function = model.kind.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function)(
            image_shape=image_shape, way=way, **model.options
        )
    except Exception as error:  # it is the user's code, and may raise anything
        raise ConfigError(
            f"model.kind: {model.kind!r} cannot be used ({brief(error)}); it must be an importable function "
            "called as factory(image_shape=(C, H, W), way=N, **other model fields)"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model.kind: {model.kind!r} returned {type(made).__name__}, expected a torch.nn.Module")
    return made


def make_loss(name: str) -> Loss:
    """Cross entropy, or a user's own function.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    if name == "cross_entropy":
        return cross_entropy
    module_name, _, function = name.partition(":")
    try:
        loss: Loss = getattr(importlib.import_module(module_name), function)
        if not callable(loss):
            raise TypeError(f"{type(loss).__name__} is not callable")
    except Exception as error:  # it is the user's code, and may raise anything
        raise ConfigError(
            f"loss: {name!r} cannot be used ({brief(error)}); it must be an importable function of outputs [T, n, N] and "
            "labels [T, n] that returns the loss of each task [T]"
        ) from error
    return loss


def make_learner(config: ExperimentConfig, image_shape: tuple[int, int, int], updates: int = 0) -> MetaLearner:
    """The learner at its initial meta-parameters, on the run's device.

    Args:
        config: resolved configuration.
        image_shape: `(C, H, W)`.
        updates: of the checkpoint that it is for, where the algorithm's numbers follow a schedule.

    Raises:
        ConfigError: see `make_model` and `make_loss`, or Lambda, the names of what adapts or the linear solver do not fit the network.
        ModelError: the network cannot be meta-trained.
    """
    model = make_model(config.model, image_shape, config.data.way, config.run.seed)
    model = model.to(config.run.device, dtype_of(config))
    execution = config.run.execution
    assert execution != "auto", "the configuration is resolved"
    autocast = torch.bfloat16 if config.run.precision == "bfloat16" else None
    algorithm, loss = make_algorithm(config.algorithm, updates), make_loss(config.loss)
    try:
        learner = MetaLearner(model, algorithm, loss, execution, autocast)
    except UnknownParameterError as error:
        raise ConfigError(f"algorithm.{error}") from error
    except ValueError as error:  # Lambda is for other parameters
        raise ConfigError(f"algorithm.lam: {error}") from error
    if isinstance(algorithm, IMAML):
        _check_solver(config, algorithm, algorithm.adapting(learner.functional.layout).size)
    return learner


def _check_solver(config: ExperimentConfig, algorithm: IMAML, size: int) -> None:
    """Refuse a linear solver that systems of `size` parameters are too large or too small for, before the first of them."""
    rows = config.data.way * config.data.shot * (config.data.way - 1)  # of a task's factors with cross entropy
    memory = rows * size * dtype_of(config).itemsize
    instead = "let fewer adapt (algorithm.adapts), or use algorithm.solver.kind: conjugate_gradient"
    match algorithm.solver:
        case Direct(max_size=most) if size > most:
            raise ConfigError(
                f"algorithm.solver.max_size: {most} given, but {size} parameters adapt, and kind direct would form a matrix of {size} x "
                f"{size} numbers for each task; raise it, {instead}"
            )
        case Nystrom(rank=rank) | ConjugateGradient(preconditioner="nystrom", rank=rank) if rank > size:
            raise ConfigError(
                f"algorithm.solver.rank: {rank} given, must be at most {size}, the number of parameters that adapt; lower it"
            )
        case Dual() if config.loss == "cross_entropy" and memory > MAX_BYTES:
            raise ConfigError(
                f"algorithm.solver.kind: dual given, which takes {memory / 2**30:.1f} GiB for the {rows} x {size} numbers of a task, may "
                f"take {MAX_BYTES / 2**30:.0f}; {instead}"
            )


def dtype_of(config: ExperimentConfig) -> torch.dtype:
    """Of parameters and images."""
    return torch.float64 if config.run.precision == "float64" else torch.float32


def open_dataset(config: ExperimentConfig) -> Dataset:
    """The data set, read as the storage section says.

    Raises:
        DataError, StorageError: it is missing, incomplete, or cannot be reached.
    """
    folder, budget = config.storage.cache, config.storage.cache_bytes
    return Dataset(
        config.data.url,
        storage_options(config),
        CacheOptions(None if folder is None else Path(folder).expanduser(), budget),
    )


def storage_options(config: ExperimentConfig) -> StorageOptions:
    """How object storage is reached."""
    return StorageOptions(**config.storage.model_dump(exclude={"cache", "cache_bytes", "prefetch"}))


def read_ahead(config: ExperimentConfig, source: TaskSource, requests: Iterable[tuple[int, range]]) -> Ahead:
    """Episodes of requests to come, made while this process computes."""
    return Ahead(source, requests, config.storage.prefetch, pin=config.run.device == "cuda")


def make_source(config: ExperimentConfig, dataset: Dataset, split: str, *, training: bool = True) -> EpisodeSource:
    """Episodes of a split; the test split with the evaluation's number of queries.

    Args:
        config: of the experiment.
        dataset: opened data set.
        split: train, val or test.
        training: draw those of the train split from pools and augment them, as configured; others never are.

    Raises:
        ConfigError: more ways or images per class than the split has, or a pool or augmentation that does not fit.
        DataError: no such split.
    """
    data = config.data
    learnt_from = training and split == "train"
    return EpisodeSource(
        dataset,
        split,
        way=data.way,
        shot=data.shot,
        query=config.evaluate.query if split == "test" else data.query,
        seed=config.run.seed,
        dtype=dtype_of(config),
        augmentation=Augmentation(**data.augment.model_dump()) if learnt_from else None,
        pool=data.pool if learnt_from else None,
        pool_steps=data.pool_steps,
    )


def make_validation_source(config: ExperimentConfig, dataset: Dataset) -> EpisodeSource | None:
    """Episodes to validate on: of the val split, or frozen ones; None where the run does not validate.

    Raises:
        ConfigError: the split has not enough classes or images, or the frozen tasks are too few or of another number of ways.
        DataError: no such split, or no such manifest of this data set.
    """
    wanted, url = config.validation.tasks, config.validation.manifest
    if not wanted:
        return None
    if url is None:
        return make_source(config, dataset, "val")
    manifest = read_manifest(url, storage_options(config))
    if manifest.way != config.data.way:
        raise ConfigError(
            f"validate.manifest: the tasks of {url} have {manifest.way} classes, data.way is {config.data.way}; freeze others"
        )
    if len(manifest.tasks) < wanted:
        raise ConfigError(
            f"validate.tasks: {wanted} given, but {url} has {len(manifest.tasks)} tasks; lower it, or freeze more"
        )
    return FrozenTasks(dataset, manifest, dtype_of(config))
