"""The meta-gradient of one task by central differences through the inner solve: the truth that an implicit gradient is held against.

It differentiates no formula: the inner problem is solved again for every moved theta, and the query loss read there. It is far too
slow to train with, and needs float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.inner.newton_cg import newton_cg
from imaml_dist.core.inner.problem import InnerProblem
from imaml_dist.core.proximal.protocol import Proximal

GOAL = 1e-7
"""Of the inner solves at a moved theta: gradient norm over that which the move brought, `||Lambda (theta' - theta)||`."""

ENOUGH = 1e-5
"""The same, above which such a solve has failed, and its quotient is nan."""

NEWTON_STEPS, ROUNDS = 10, 16
"""Newton steps of a round, and rounds of an inner solve, at most."""

CG_ITERATIONS, DOUBLINGS = 60, 2
"""Products for each Newton direction in the first round, and how often they are doubled from round to round: on the way a rough
direction does, at the end of an ill-conditioned solve it does not."""

SLOWEST, PATIENCE = 1e-2, 2
"""Relative fall of G in a round, below which it was idle unless it halved the gradient, and idle rounds in a row that end the solve."""


@dataclass(frozen=True)
class Quotients:
    """Central differences along k directions.

    Attributes:
        values: `[k]`, `(F(theta + h d) - F(theta - h d)) / 2h` with the smaller of two h; nan where an inner solve failed.
        wide: `[k]`, the same with twice that h. Where F has a derivative the two differ by about `h^2`: their distance is the
            differences' own error.
    """

    values: Tensor
    wide: Tensor


def nearby_minimiser(
    objective: Objective, anchor: Tensor, start: Tensor, goal: Tensor, *, proximal: Proximal, damping: float
) -> tuple[Tensor, Tensor]:
    """A stationary point of `G(phi) = L(phi) + 1/2 (phi - theta)' Lambda (phi - theta)` reached downhill from a start.

    By Newton-CG with the Hessian of G, whose end is quadratic, in at most `ROUNDS` rounds. It gives up after two rounds that
    neither halved a task's gradient nor lowered its G, as at a kink of L.

    Args:
        objective: L, `[T, P] -> [T]`, twice differentiable.
        anchor: theta, `[T, P]`.
        start: `[T, P]`.
        goal: `[T]`, the norm of grad G that is enough; all go on until the one that is farthest from it is there.
        proximal: Lambda.
        damping: that every round begins with; 0 where G is known to be convex.

    Returns:
        `[T, P]`, and the norm of grad G there, `[T]`.
    """
    inner = InnerProblem(objective, anchor, proximal)

    def size(phi: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(inner.loss_and_gradient(phi)[1], dim=-1)
        return norm

    def total(phi: Tensor) -> Tensor:
        with torch.no_grad():
            return inner.total(objective(phi), phi)

    phi, left, value = start, size(start), total(start)
    first, idle = left, 0
    for round_ in range(ROUNDS):
        if not bool((left > goal).any()):
            break
        phi = newton_cg(
            lambda at: inner.total(objective(at), at),
            phi,
            steps=NEWTON_STEPS,
            cg_iterations=min(CG_ITERATIONS << min(round_, DOUBLINGS), phi.shape[1]),
            tolerance=float(torch.nan_to_num(goal / left, nan=0.5).min().clamp(max=0.5)),
            damping=damping * float(torch.nan_to_num(left / first, nan=1.0).max()),
        ).params
        left_before, left = left, size(phi)
        value_before, value = value, total(phi)
        better = (left < left_before / 2) | (value < value_before - SLOWEST * value_before.abs())
        idle = 0 if bool(better.any()) else idle + 1
        if idle == PATIENCE:
            break
    return phi, left


def central_differences(
    support_loss: Objective,
    query_loss: Objective,
    anchor: Tensor,
    solution: Tensor,
    directions: Tensor,
    step: float,
    *,
    proximal: Proximal,
    at_once: int = 8,
) -> Quotients:
    """Derivatives of `F(theta) = L_query(phi*(theta))` along directions, without the implicit function theorem.

    `phi*(theta +- h d)` is solved anew from `phi*(theta)`, so that it stays on the branch of minimisers that it is on.

    Args:
        support_loss, query_loss: of one task under any number of rows of parameters, `[R, P] -> [R]`.
        anchor: theta, `[P]`.
        solution: `phi*(theta)`, `[P]`, a minimiser of G.
        directions: d, `[k, P]`.
        step: the larger h, > 0; halved for the other.
        proximal: Lambda.
        at_once: rows in one call; 1 where the model cannot be vectorised.

    Returns:
        Quotients.

    Raises:
        ValueError: `step` or `at_once` is not positive.
    """
    if not step > 0 or at_once < 1:
        raise ValueError(f"need step > 0 and at_once >= 1, got {step} and {at_once}")
    steps = torch.tensor([-step, step, -step / 2, step / 2], dtype=anchor.dtype, device=anchor.device)
    moves = (steps[:, None, None] * directions).flatten(0, 1)
    values = torch.cat(
        [_moved(support_loss, query_loss, anchor, solution, some, proximal) for some in torch.split(moves, at_once)]
    ).reshape(4, -1)
    return Quotients(values=(values[3] - values[2]) / step, wide=(values[1] - values[0]) / (2 * step))


def _moved(
    support_loss: Objective,
    query_loss: Objective,
    anchor: Tensor,
    solution: Tensor,
    moves: Tensor,
    proximal: Proximal,
) -> Tensor:
    """`F(theta + move)` for moves `[R, P]`, `[R]`; nan where the inner solve failed."""
    pull = torch.linalg.vector_norm(proximal.apply(moves), dim=-1)
    start = solution.expand_as(moves)
    phi, left = nearby_minimiser(support_loss, anchor + moves, start, GOAL * pull, proximal=proximal, damping=0.0)
    with torch.no_grad():
        return torch.where(left <= ENOUGH * pull, query_loss(phi), torch.nan)
