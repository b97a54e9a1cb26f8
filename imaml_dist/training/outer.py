"""The outer optimiser: a torch optimiser over the meta-parameters, its rate a pure function of the meta-step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from imaml_dist.config.schema import OuterConfig


def make_optimizer(model: nn.Module, outer: OuterConfig) -> torch.optim.Optimizer:
    """Adam or SGD over the parameters that require a gradient, in the model's own order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if outer.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=outer.lr, weight_decay=outer.weight_decay)
    return torch.optim.Adam(parameters, lr=outer.lr, weight_decay=outer.weight_decay)


def learning_rate(outer: OuterConfig, step: int, steps: int) -> float:
    """Rate of meta-step `step` (from 0) of `steps`: linear warm-up to `lr`, then the schedule towards 0."""
    if step < outer.warmup:
        return outer.lr * (step + 1) / outer.warmup
    progress = (step - outer.warmup) / max(1, steps - outer.warmup)
    if outer.schedule == "linear":
        return outer.lr * (1.0 - progress)
    if outer.schedule == "cosine":
        return outer.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return outer.lr


def clip_norm(gradient: Tensor, limit: float | None) -> tuple[Tensor, float]:
    """The gradient `[P]`, shortened to norm `limit` if it is longer, and the norm it had."""
    norm = float(torch.linalg.vector_norm(gradient))
    if limit is not None and norm > limit:
        gradient = gradient * (limit / norm)
    return gradient, norm
