"""Episodes: the few-shot tasks of a meta-step, batched over tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EpisodeBatch:
    """T episodes of one shape.

    Attributes:
        support_x: `[T, N*K, ...]`, the labelled samples a task adapts to.
        support_y: `[T, N*K]`, int64 labels 0..N-1 (or targets).
        query_x: `[T, N*Q, ...]`, the samples an adapted model is judged by.
        query_y: `[T, N*Q]`.
        index: `[T]` int64, the tasks' numbers within their meta-step.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def __getitem__(self, tasks: slice) -> EpisodeBatch:
        return EpisodeBatch(*(tensor[tasks] for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The same episodes on `device`."""
        return EpisodeBatch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.support_x, self.support_y, self.query_x, self.query_y, self.index


class TaskSource(Protocol):
    """Where episodes come from. `episodes` is a pure function of (seed, step, task): no history, no order, thread-safe."""

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        """Episodes `tasks` of meta-step `step`."""
        ...
