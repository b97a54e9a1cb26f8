"""Where a start of the training loop takes the state from: survivors' memory, the newest checkpoint, a warm start, or nothing."""

from __future__ import annotations

import os

import torch

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.giving_up import getting_on
from imaml_dist.distributed.group import Group, first_rank_decides
from imaml_dist.distributed.memory import Memory, checkpoint_of_first_rank, newest
from imaml_dist.errors import CheckpointError, TrainingError
from imaml_dist.tracking import metrics_file
from imaml_dist.training import checkpoints, warm_start
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import MetaState, sha256_of


def resume(
    config: ExperimentConfig,
    run: RunDirectory,
    group: Group,
    learner: MetaLearner,
    state: MetaState,
    memory: Memory | None,
    after: str | None,
) -> Memory | None:
    """Bring the state to where the run goes on, make sure that all ranks begin alike, and note the start.

    Args:
        config, run, group, learner, state: of the worker.
        memory: what this process remembers.
        after: why a group before this one was lost.

    Returns:
        What was taken from a survivor; None if the state comes from elsewhere.

    Raises:
        TrainingError: the ranks do not begin alike, or one loss follows another without anything done between them.
        CheckpointError: no checkpoint verifies, or the warm start does not fit.
        StorageError: the start cannot be noted.
    """
    rejected: list[str] = []
    warm: str | None = None
    reached = first_rank_decides(group, lambda: getting_on(run, after))
    taken = _whole(run, group, newest(group, memory))
    if taken is not None:
        state.restore(taken.tensors, taken.facts)
    elif (found := first_rank_decides(group, lambda: _newest_checkpoint(run, rejected))) > 0:
        state.restore(*checkpoint_of_first_rank(group, run, found))
    elif config.warm_start.path is not None:
        warm = _warm_start(config, group, learner, config.warm_start.path)
    digest = int(sha256_of(state.tensors())[:15], 16)
    begun = group.gather(torch.tensor([os.getpid(), digest], dtype=torch.int64))
    if len({int(b[1]) for b in begun}) > 1:
        raise TrainingError(
            "the workers do not begin with the same meta-parameters; a model factory must build the same network everywhere "
            "(seed it from torch alone), and all workers must run on one kind of machine"
        )
    if group.rank == 0:
        facts = {"step": state.step, "reached": reached, "world_size": group.world, "pids": [int(b[0]) for b in begun]}
        facts |= {"from": "memory"} if taken is not None else {}
        facts |= {"after": after} if after else {}
        facts |= {"rejected": rejected} if rejected else {}
        facts |= {"warm_start": {"path": config.warm_start.path, "sha256": warm}} if warm else {}
        try:
            # What lies beyond is damaged, or would be mistaken for newer than what this start writes.
            run.set_checkpoints_aside_after(state.step)
            metrics_file.rewind(run.metrics_file, state.step if taken is None else taken.written)
            run.record_start(facts)
        except OSError as error:
            raise run.cannot_be_written(error) from error
    return taken


def _whole(run: RunDirectory, group: Group, memory: Memory | None) -> Memory | None:
    """What is remembered, if rank 0 finds all on disk that a run leaves behind before it."""
    return memory if memory is not None and first_rank_decides(group, lambda: _is_written(run, memory)) else None


def _is_written(run: RunDirectory, memory: Memory) -> bool:
    """A full or slow disk, or one whose writer was killed, may owe some of it for ever."""
    best = int(memory.facts["best"]["step"])
    try:
        if 0 <= best <= memory.written:  # a later one is written as the step is ended again
            run.load_checkpoint(best)
    except CheckpointError:
        return False
    return metrics_file.reached(run.metrics_file) >= memory.written


def _newest_checkpoint(run: RunDirectory, rejected: list[str]) -> int:
    loaded = run.newest_checkpoint(rejected.append)
    return 0 if loaded is None else checkpoints.step_of(loaded[1])


def _warm_start(config: ExperimentConfig, group: Group, learner: MetaLearner, path: str) -> str:
    """Begin with the model of another run: every rank reads it for itself, and must read what rank 0 reads."""

    def read() -> str:
        return warm_start.load_into(learner.model, path, config.warm_start.skip)

    expected, digest = first_rank_decides(group, lambda: int(read()[:15], 16)), read()
    if int(digest[:15], 16) != expected:
        raise CheckpointError(
            f"warm_start.path: {path} is not the same for all workers; put it on storage that they share, "
            "and let no run write to it"
        )
    return digest
