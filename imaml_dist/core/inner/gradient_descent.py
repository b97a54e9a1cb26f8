"""Plain gradient descent on the proximal inner problem."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.outcome import inner_outcome
from imaml_dist.core.proximal.protocol import Proximal


def gradient_descent(
    objective: Objective, anchor: Tensor, *, lr: float, steps: int, proximal: Proximal | None = None
) -> InnerSolution:
    """`steps` steps of `phi <- phi - lr (grad L(phi) + Lambda (phi - theta))`, from phi = theta.

    The proximal term is part of *every* step, so that phi approaches the minimiser of
    `G(phi) = L(phi) + R(phi - theta)`, which is the point the implicit gradient differentiates. One gradient a step
    and one more at the end, for the stationarity. Memory does not depend on `steps`: no graph is kept.

    Args:
        objective: support loss, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        lr: step size > 0. On a quadratic with Hessian H it converges for `lr < 2 / max eig(H + Lambda)`.
        steps: number of steps >= 0.
        proximal: the regulariser R; None leaves it out (MAML's inner loop).

    Returns:
        InnerSolution.

    Raises:
        ValueError: `lr` <= 0 or `steps` < 0.

    Source: iMAML algorithm 2, eq. 3-4.
    """
    if not lr > 0 or steps < 0:
        raise ValueError(f"need lr > 0 and steps >= 0, got lr={lr}, steps={steps}")

    def value_and_gradient(phi: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            phi = phi.detach().requires_grad_(True)
            losses = objective(phi)
            (gradient,) = torch.autograd.grad(losses.sum(), phi)
        return losses.detach(), gradient

    anchor = anchor.detach()
    phi = anchor
    losses, gradient = value_and_gradient(phi)
    first_loss, first_gradient = losses, gradient  # at phi = theta the proximal term and its gradient vanish
    with torch.no_grad():
        for _ in range(steps):
            phi = phi - lr * gradient
            losses, gradient = value_and_gradient(phi)
            if proximal is not None:
                gradient = gradient + proximal.apply(phi - anchor)
        total = losses if proximal is None else losses + proximal.value(phi - anchor)
    return InnerSolution(
        params=phi,
        loss=losses,
        stationarity=stationarity(gradient, first_gradient),
        steps=torch.full_like(losses, steps, dtype=torch.int64),
        outcome=inner_outcome(first_loss, total),
    )
