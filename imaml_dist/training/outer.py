"""The outer optimiser: a torch optimiser over all that is learned, its rate a pure function of the updates done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imaml_dist.training.meta_parameters import MetaParameters

if TYPE_CHECKING:
    from imaml_dist.config.schema import OuterConfig


def make_optimizer(parameters: MetaParameters, outer: OuterConfig) -> torch.optim.Optimizer:
    """A group for the model's parameters, in the model's own order, and one for the algorithm's own if it has any.

    Every group has a `scale`: its rate is `scale` times that of `learning_rate`, so all follow one schedule. The
    algorithm's own parameters are never decayed: their zero has no meaning.
    """
    groups = [{"params": [p for p in parameters.model.parameters() if p.requires_grad], "scale": 1.0}]
    if parameters.own:
        own_lr = outer.lr if parameters.own_lr is None else parameters.own_lr
        groups.append({"params": list(parameters.own.values()), "scale": own_lr / outer.lr, "weight_decay": 0.0})
    if outer.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=outer.lr, momentum=outer.momentum, nesterov=outer.nesterov, weight_decay=outer.weight_decay
        )
    kind = torch.optim.AdamW if outer.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=outer.lr, betas=(outer.beta1, outer.beta2), eps=outer.eps, weight_decay=outer.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(outer: OuterConfig, updates: int, steps: int) -> float:
    """Rate of the update that follows `updates` applied ones: linear warm-up to `lr`, then the schedule towards 0.

    It counts updates and not meta-steps: a skipped step moves neither the optimiser nor its rate. A run of `steps`
    meta-steps, some of them skipped, therefore ends before the schedule does.

    Args:
        outer: of the configuration.
        updates: applied so far, 0 .. steps - 1.
        steps: meta-steps of the whole run.
    """
    if updates < outer.warmup:
        return outer.lr * (updates + 1) / outer.warmup
    progress = (updates - outer.warmup) / max(1, steps - outer.warmup)
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


def is_usable(accepted: int, tasks: int, norm: float) -> bool:
    """Whether a meta-step is applied: at least half of its tasks accepted, and a gradient of finite norm.

    A mean over few survivors is the gradient of a different set of tasks; the step is skipped then.
    """
    return accepted > 0 and 2 * accepted >= tasks and math.isfinite(norm)
