"""Which episodes can be used: finite data, and labels that the model has an output for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imaml_dist.tasks.episode import EpisodeBatch


def validity(episodes: EpisodeBatch, outputs: int | None) -> Tensor:
    """`[T]` bool: whether every number of a task is finite and every label in 0..`outputs` - 1.

    Args:
        episodes: T tasks.
        outputs: number of the model's outputs; None where targets are no labels.
    """
    valid = torch.ones(len(episodes), dtype=torch.bool, device=episodes.index.device)
    for numbers in (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y):
        if numbers.is_floating_point():
            valid &= numbers.isfinite().flatten(1).all(-1)
    if outputs is not None:
        for labels in (episodes.support_y, episodes.query_y):
            valid &= ((labels >= 0) & (labels < outputs)).flatten(1).all(-1)
    return valid


def sanitised(episodes: EpisodeBatch, valid: Tensor) -> EpisodeBatch:
    """The episodes with zeros in place of every task that is not valid, so that it can be computed and thrown away.

    Labels out of range would otherwise stop the program, on a GPU the whole device. The bits of the others stay.
    """

    def cleaned(numbers: Tensor) -> Tensor:
        return torch.where(valid.reshape(-1, *(1,) * (numbers.dim() - 1)), numbers, torch.zeros_like(numbers))

    return replace(
        episodes,
        support_x=cleaned(episodes.support_x),
        support_y=cleaned(episodes.support_y),
        query_x=cleaned(episodes.query_x),
        query_y=cleaned(episodes.query_y),
    )
