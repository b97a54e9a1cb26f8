"""The inner problem `G(phi) = L(phi) + R(phi - theta)` of T tasks: its value and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.curvature import Linearise, Matvec, Objective
from imaml_dist.core.outcome import all_finite
from imaml_dist.core.proximal.protocol import Proximal


@dataclass(frozen=True)
class InnerProblem:
    """Minimise `G_t(phi) = L_t(phi) + R(phi - theta_t)` for every task t.

    Attributes:
        objective: support loss L, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`: the start and the proximal centre, never differentiated.
        proximal: R; None leaves it out.

    Raises:
        ValueError: `anchor` is not a matrix.
    """

    objective: Objective
    anchor: Tensor
    proximal: Proximal | None = None

    def __post_init__(self) -> None:
        if self.anchor.dim() != 2:
            raise ValueError(f"anchor must be [T, P], got shape {tuple(self.anchor.shape)}")

    def loss_and_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """`(L(phi), grad G(phi))`, `[T]` and `[T, P]`, from one forward and one backward pass."""
        with torch.enable_grad():
            point = phi.detach().requires_grad_(True)
            losses = self.objective(point)
            (gradient,) = torch.autograd.grad(losses.sum(), point)
        return losses.detach(), self.with_pull(gradient, phi)

    def linearised(self, phi: Tensor, linearise: Linearise) -> tuple[Tensor, Tensor, Matvec]:
        """`(L(phi), grad G(phi), products with L's curvature at phi)` from the passes of one gradient."""
        found = linearise(phi)
        return found.losses, self.with_pull(found.gradient, phi), found.curvature

    def with_pull(self, gradient: Tensor, phi: Tensor) -> Tensor:
        """`grad L(phi) + Lambda (phi - theta)`, `[T, P]`, from grad L(phi)."""
        return gradient if self.proximal is None else self.proximal.add_to(gradient, phi - self.anchor)

    def total(self, losses: Tensor, phi: Tensor) -> Tensor:
        """`G(phi)`, `[T]`, from L(phi)."""
        return losses if self.proximal is None else losses + self.proximal.value(phi - self.anchor)


def finite(losses: Tensor, gradient: Tensor) -> Tensor:
    """Tasks whose loss and gradient are finite, `[T], [T, P] -> [T]` bool."""
    return losses.isfinite() & all_finite(gradient)
