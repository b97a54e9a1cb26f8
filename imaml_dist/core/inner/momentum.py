"""Gradient descent with momentum, as torch.optim.SGD defines it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.inner.rule import Rate, State, refuse_bad_rate


@dataclass(frozen=True)
class MomentumRule:
    """`b <- momentum b + gradient`, `update = lr b`; with Nesterov `update = lr (gradient + momentum b)`.

    Args:
        lr: step size.
        momentum: in [0, 1).
        nesterov: look ahead along the velocity b.

    Raises:
        ValueError: an argument outside its range.

    Source: Sutskever et al. (2013), in the form of torch.optim.SGD (no dampening, no weight decay).
    """

    lr: Rate
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        refuse_bad_rate(self.lr)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"need 0 <= momentum < 1, got {self.momentum}")

    def start(self, phi: Tensor) -> State:
        """Velocity 0, `[T, P]`."""
        return (torch.zeros_like(phi),)

    def update(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """`lr b`, or `lr (gradient + momentum b)`, `[T, P]`, and the new velocity."""
        (velocity,) = state
        velocity = self.momentum * velocity + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return self.lr * direction, (velocity,)
