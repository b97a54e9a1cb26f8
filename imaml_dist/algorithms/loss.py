"""The losses tasks adapt to and are judged by, and whether a user's own can serve as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from imaml_dist.errors import LossError, brief
from imaml_dist.models.preflight import second_derivative

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(outputs [T, n, ...], targets [T, n, ...]) -> [T]`, the mean over each task's samples."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy per task: `[T, n, C]` logits, `[T, n]` labels -> `[T]`."""
    losses = torch_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape).mean(-1)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error per task over samples and components: `[T, n, ...]`, `[T, n, ...]` -> `[T]`.

    Raises:
        ValueError: the shapes differ; they would be broadcast against each other.
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must have one shape")
    return (outputs - targets).square().flatten(1).mean(-1)


def preflight_loss(loss: Loss, outputs: Tensor, targets: Tensor, *, twice: bool = True) -> None:
    """Refuse a loss that is no function of each task's own outputs.

    Args:
        loss: to be tried.
        outputs: `[T, n, ...]`, T >= 1, finite, as the model gives them.
        targets: `[T, n, ...]`.
        twice: whether second derivatives will be needed.

    Raises:
        LossError: it raises, returns anything but one number per task, mixes tasks, or cannot be differentiated.
    """
    outputs, targets = outputs.detach()[[0, -1]].requires_grad_(), targets[[0, -1]]
    shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    try:
        with torch.enable_grad():
            found = loss(outputs, targets)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it is the user's code, and may raise anything
        raise LossError(f"the loss of {shapes} cannot be computed ({brief(error)})") from error
    if not isinstance(found, Tensor) or found.shape != (2,):
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise LossError(
            f"the loss of 2 tasks, {shapes}, has {given}, should be a tensor of shape (2,): the mean over the samples of each task, not "
            "over tasks"
        )
    if not found.requires_grad:
        raise LossError(
            "the loss does not depend on the outputs, or was detached from them, so nothing could be learned"
        )
    (slope,) = torch.autograd.grad(found[0], outputs)
    if bool(slope[1].any()):
        raise LossError(
            "the loss of one task depends on the outputs of another; each must come from its own row [n, ...] alone"
        )
    if twice:
        try:
            # Squared: torch leaves out a backward pass marked `once_differentiable` if what comes into it is a constant.
            second_derivative(lambda at: loss(at, targets).square().sum(), outputs)
        except RuntimeError as error:
            raise LossError(
                f"the loss cannot be differentiated twice ({brief(error)}); a first-order algorithm can use it"
            ) from error
