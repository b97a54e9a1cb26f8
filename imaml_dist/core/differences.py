"""The meta-gradient of one task by central differences through the inner solve: the truth that an implicit gradient is held against.

It differentiates no formula: the inner problem is solved again for every moved theta, and the query loss read there. It is far too
slow to train with, and needs float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imaml_dist.core.curvature import Objective, linearise_hessian
from imaml_dist.core.inner.newton_cg import ROUNDING, newton_cg
from imaml_dist.core.inner.problem import InnerProblem
from imaml_dist.core.linear.solution import dot
from imaml_dist.core.proximal.protocol import Proximal

GOAL = 1e-7
"""Of the inner solves at a moved theta: gradient norm over that which the move brought, the one at `phi*(theta)`."""

ENOUGH = 1e-5
"""The same, above which such a solve has failed, and its quotient is nan."""

NEWTON_STEPS, ROUNDS = (10, 10, 10, 5, 3), 16
"""Newton steps of a round, by how often its products are doubled; rounds of an inner solve, at most."""

CG_ITERATIONS, USUAL, MOST = 60, 2, 4
"""Products for each Newton direction in the first round, and how often they are doubled: on the way a rough direction does, and many
steps count; at the end of an ill-conditioned solve it does not."""

SLOWEST, PROMISE, PATIENCE = 1e-2, 0.25, 2
"""Relative fall of G in a round, and its part of what one step of steepest descent is promised, either of which is progress; idle
rounds in a row that end the solve."""

POLISH = 1
"""Doublings of the products of the last Newton step at a moved theta, which shows what the solve before it had left."""


class Moved(Protocol):
    """One task at R meta-parameters, a row each: what adapts begins at `anchor` `[R, E]`, and losses are `[R, E] -> [R]`."""

    @property
    def anchor(self) -> Tensor:
        """Start and proximal centre."""
        ...

    def support_loss(self, params: Tensor) -> Tensor:
        """L."""
        ...

    def query_loss(self, params: Tensor) -> Tensor:
        """The loss that F tells."""
        ...


@dataclass(frozen=True)
class Quotients:
    """Central differences along k directions; nan where an inner solve failed.

    Attributes:
        values: `[k]`, `(F(theta + h d) - F(theta - h d)) / 2h` with the smaller of two h.
        wide: `[k]`, the same with twice that h. Where F has a derivative the two differ by about `h^2`.
        rough: `[k]`, as `values`, before the last Newton step of the inner solves. It shows their bias, to which h and 2h are
            blind: a residual that is proportional to the move changes both alike. What neither the solve nor that step reaches,
            as in a spectrum too wide for their products, none of the three shows.
    """

    values: Tensor
    wide: Tensor
    rough: Tensor


def nearby_minimiser(
    objective: Objective, anchor: Tensor, start: Tensor, goal: Tensor, *, proximal: Proximal, damping: float
) -> tuple[Tensor, Tensor]:
    """A stationary point of `G(phi) = L(phi) + 1/2 (phi - theta)' Lambda (phi - theta)` reached downhill from a start.

    By Newton-CG with the Hessian of G, whose end is quadratic, in at most `ROUNDS` rounds. Every round doubles the products of
    the next one's directions, to 240; one in which no unsolved task had its gradient halved or its G lowered by 1 %, to 960.

    It gives up after two rounds in which no unsolved task made progress. Progress is a gradient halved, a G lower by 1 %, or by a
    quarter of what the quadratic model promises to one step of steepest descent, `||g||^4 / 2 g'(H + Lambda)g`: on a smooth
    G near its minimum a round of Newton-CG does that, ill-conditioned as it may be, and at a kink none does, where the gradient stays
    large and the model is false. Where the promise is below the rounding of G nothing is asked until the products are at their most.

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

    def seen(phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm of grad G, G, and what steepest descent is promised."""
        losses, gradient, curvature = inner.linearised(phi, lambda at: linearise_hessian(objective, at))
        bend = dot(gradient, proximal.add_to(curvature(gradient), gradient))
        squared = dot(gradient, gradient)
        promise = torch.where(bend > 0, 0.5 * squared * (squared / bend), torch.inf)
        return squared.sqrt(), inner.total(losses, phi), promise

    phi = start
    left, value, promise = seen(start)
    first, doublings, idle = left, 0, 0
    for _ in range(ROUNDS):
        if not bool((left > goal).any()):
            break
        tolerance = float(torch.nan_to_num(goal / left, nan=0.5).min().clamp(max=0.5))
        strength = damping * float(torch.nan_to_num(left / first, nan=1.0).max())
        phi = _newton(inner, phi, NEWTON_STEPS[doublings], doublings, tolerance, strength)
        (left_before, value_before, promised), (left, value, promise) = (left, value, promise), seen(phi)

        fall, noise = value_before - value, ROUNDING * torch.finfo(value.dtype).eps * value.abs()
        fast = (left < left_before / 2) | (fall > SLOWEST * value_before.abs())
        better = fast | torch.where(promised > noise, fall > PROMISE * promised, doublings < MOST)
        idle = 0 if bool((better & (left > goal)).any()) else idle + 1
        if idle == PATIENCE:
            break
        doublings = min(doublings + 1, USUAL if bool((fast & (left > goal)).any()) else MOST)
    return phi, left


def _newton(
    inner: InnerProblem, phi: Tensor, steps: int, doublings: int, tolerance: float = 0.0, damping: float = 0.0
) -> Tensor:
    """Newton-CG on G from phi `[T, P]`."""
    return newton_cg(
        lambda at: inner.total(inner.objective(at), at),
        phi,
        steps=steps,
        cg_iterations=min(CG_ITERATIONS, phi.shape[1]) << doublings,
        tolerance=tolerance,
        damping=damping,
    ).params


def central_differences(
    task: Callable[[Tensor], Moved],
    theta: Tensor,
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
        task: from any number of meta-parameters `[R, P]` to the task there.
        theta: `[P]`.
        solution: `phi*(theta)`, `[E]`, a minimiser of G; E is P where all parameters adapt.
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
    steps = torch.tensor([-step, step, -step / 2, step / 2], dtype=theta.dtype, device=theta.device)
    moves = (steps[:, None, None] * directions).flatten(0, 1)
    parts = [_moved(task(theta + some), solution, proximal) for some in torch.split(moves, at_once)]
    rough, values = torch.cat(parts, dim=1).reshape(2, 4, -1)
    return Quotients(
        values=(values[3] - values[2]) / step,
        wide=(values[1] - values[0]) / (2 * step),
        rough=(rough[3] - rough[2]) / step,
    )


def _moved(moved: Moved, solution: Tensor, proximal: Proximal) -> Tensor:
    """F at R meta-parameters where the inner solve ends, and a Newton step later: `[2, R]`; nan where it failed."""
    inner, start = InnerProblem(moved.support_loss, moved.anchor, proximal), solution.expand_as(moved.anchor)
    brought = torch.linalg.vector_norm(inner.loss_and_gradient(start)[1], dim=-1)
    goal = GOAL * brought
    phi, left = nearby_minimiser(moved.support_loss, moved.anchor, start, goal, proximal=proximal, damping=0.0)
    polished = _newton(inner, phi, 1, POLISH)
    with torch.no_grad():
        found = torch.stack([moved.query_loss(phi), moved.query_loss(polished)])
    return torch.where(left <= ENOUGH * brought, found, torch.nan)
