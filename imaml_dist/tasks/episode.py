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

    Raises:
        InputError: the tensors differ in the number of tasks, or samples and their labels in number.
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
        tasks, support, query = self.index.shape, self.support_x.shape[:2], self.query_x.shape[:2]
        one_row_each = len(tasks) == 1 and self.key.shape == support[:1] == query[:1] == tasks
        labelled = self.support_y.shape[:2] == support and self.query_y.shape[:2] == query
        if not (one_row_each and labelled and len(support) == len(query) == 2):
            given = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in _TENSORS)
            raise InputError(
                f"episodes of {given}: each needs one row per task, support_x and support_y one entry per sample after that, query_x "
                "and query_y too; give tasks of several shapes as a list of batches"
            )

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

    def pinned(self) -> EpisodeBatch:
        """The same episodes in memory from which copies to a GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

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
