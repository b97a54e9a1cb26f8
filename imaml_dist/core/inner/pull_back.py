"""The public reference code's stand-in for the proximal term: one step on it after the inner solver, none during it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.implicit import query_gradient
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.proximal.protocol import Proximal


def pull_back(
    objective: Objective, anchor: Tensor, solution: InnerSolution, *, lr: float, proximal: Proximal
) -> InnerSolution:
    """`phi <- phi - lr Lambda (phi - theta)`, one step of gradient descent on the proximal term alone.

    The result is not the minimiser of the proximal problem; the stationarity reported is the one of that problem at the
    new point. It costs two gradients.

    Args:
        objective: support loss, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`.
        solution: of an inner solver without a proximal term.
        lr: step size.
        proximal: Lambda.

    Returns:
        `solution` with the new `params`, their `loss` and `stationarity`, and no `curvature`.

    Source: aravindr93/imaml_dev, whose inner loop this reproduces.
    """
    phi = solution.params - lr * proximal.apply(solution.params - anchor)
    loss, gradient = query_gradient(objective, phi)
    _, first = query_gradient(objective, anchor)
    with torch.no_grad():
        ratio = stationarity(gradient + proximal.apply(phi - anchor), first)
    return replace(solution, params=phi, loss=loss, stationarity=ratio, curvature=None)
