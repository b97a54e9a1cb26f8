"""What the survivors of a loss still know, so that nothing is computed twice.

A rank whose group is lost holds a whole meta-state: collectives come between meta-steps' computing and their end, never
within the update. Survivors may be one step apart, for the last collective can have reached some and not others; the newest
state is as good as any, being a sum over all tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_dist.distributed.agreement import Course
from imaml_dist.distributed.group import Group, first_rank_decides
from imaml_dist.tracking.metrics_file import Record
from imaml_dist.training import checkpoints
from imaml_dist.training.packing import pack, unpack
from imaml_dist.training.run_directory import RunDirectory, State
from imaml_dist.training.state import sha256_of


@dataclass(frozen=True)
class Memory:
    """A meta-state outside of any checkpoint.

    Attributes:
        tensors, facts: of the state.
        record: metrics of the last committed meta-step, which rank 0 may not have written; None if there is none.
        doubted: this rank's course from here to a disagreement, of which it is to be found out whether it was the right one.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    record: Record | None
    doubted: Course | None = None

    @property
    def step(self) -> int:
        """Committed meta-steps."""
        return checkpoints.step_of(self.facts)

    @property
    def written(self) -> int:
        """Meta-steps whose metrics are surely written."""
        return self.step if self.record is None else int(self.record["step"])


def checkpoint_of_first_rank(group: Group, run: RunDirectory, step: int) -> State:
    """The checkpoint of a step as rank 0 reads it, on every rank; the others need not see where it lies.

    Raises:
        CheckpointError, StorageError: rank 0 cannot read it; ranks other than 0 raise an `ImamlError` that only says so.
    """
    found: list[State] = []

    def read() -> int:
        found.append(run.load_checkpoint(step))
        return 0

    first_rank_decides(group, read)
    if group.world == 1:
        return found[0]
    return unpack(group.broadcast(pack(*found[0]) if found else b"", 0))


def newest(group: Group, mine: Memory | None) -> Memory | None:
    """The newest that any rank remembers, on every rank; None if none remembers anything.

    None, too, if two that remember equally much differ: then only a checkpoint can be trusted.
    """
    step = -1 if mine is None else mine.step
    digest = 0 if mine is None else int(sha256_of(mine.tensors)[:15], 16)
    known = [row.tolist() for row in group.gather(torch.tensor([step, digest], dtype=torch.int64))]
    most = max(known)[0]
    holders = [rank for rank, (step, _) in enumerate(known) if step == most]
    if most < 0 or len({known[rank][1] for rank in holders}) > 1:
        return None
    source = holders[0]
    packed = (
        b""
        if mine is None or group.rank != source
        else pack(mine.tensors, {"facts": mine.facts, "record": mine.record})
    )
    tensors, told = unpack(group.broadcast(packed, source))
    return Memory(tensors, told["facts"], told["record"])
