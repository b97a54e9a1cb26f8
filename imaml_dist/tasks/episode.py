"""Episodes: the few-shot tasks of a meta-step, batched over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imaml_dist.errors import InputError


@dataclass(frozen=True)
class EpisodeBatch:
    """T episodes of one shape.

    Attributes:
        support_x: `[T, N*K, ...]`, the labelled samples a task adapts to.
        support_y: `[T, N*K]`, int64 labels 0..N-1 (or targets).
        query_x: `[T, N*Q, ...]`, the samples an adapted model is judged by.
        query_y: `[T, N*Q]`.
        index: `[T]` int64, the tasks' numbers within their meta-step.
        key: `[T]` int64, from which the dropout masks of a task follow; different for every task that is ever drawn. The
            index where None is given: then every meta-step drops alike.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    index: Tensor
    key: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.key is None:
            object.__setattr__(self, "key", self.index)

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def __getitem__(self, tasks: slice) -> EpisodeBatch:
        return self._map(lambda tensor: tensor[tasks])

    def chosen(self, tasks: Tensor) -> EpisodeBatch:
        """The tasks where `[T]` bool is true."""
        return self._map(lambda tensor: tensor[tasks])

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """The same episodes on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    @staticmethod
    def stack(episodes: Sequence[EpisodeBatch]) -> EpisodeBatch:
        """Batches of one shape as one batch.

        Raises:
            InputError: their shapes differ (ragged episodes), or there is none.
        """
        if not episodes:
            raise InputError("there are no episodes to stack; give at least one")
        first = episodes[0]
        for number, other in enumerate(episodes):
            for name in ("support_x", "support_y", "query_x", "query_y"):
                expected, found = getattr(first, name).shape[1:], getattr(other, name).shape[1:]
                if expected != found:
                    raise InputError(
                        f"episode {number} has {name} of shape {tuple(found)} per task, episode 0 {tuple(expected)}; one batch holds "
                        "tasks of one shape: give a list of batches, one for each shape, to meta_gradient or backward"
                    )
        return EpisodeBatch(*(torch.cat([getattr(e, name) for e in episodes]) for name in _TENSORS))

    def _map(self, change: Callable[[Tensor], Tensor]) -> EpisodeBatch:
        return EpisodeBatch(*(change(getattr(self, name)) for name in _TENSORS))


_TENSORS = ("support_x", "support_y", "query_x", "query_y", "index", "key")


class TaskSource(Protocol):
    """Where episodes come from. `episodes` is a pure function of (seed, step, task): no history, no order, thread-safe."""

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        """Episodes `tasks` of meta-step `step`."""
        ...
