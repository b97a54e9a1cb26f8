"""Descent by any update rule on the proximal inner problem: the loop without a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imaml_dist.core.curvature import Linearise, Matvec, Objective
from imaml_dist.core.inner.problem import InnerProblem, finite
from imaml_dist.core.inner.rule import Rule
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.outcome import TaskOutcome, all_finite, inner_outcome
from imaml_dist.core.proximal.protocol import Proximal


def descend(
    objective: Objective,
    anchor: Tensor,
    rule: Rule,
    *,
    steps: int,
    tolerance: float = 0.0,
    proximal: Proximal | None = None,
    batches: Sequence[Objective] | None = None,
    linearise: Linearise | None = None,
) -> InnerSolution:
    """At most `steps` steps `phi <- phi - rule(grad G(phi))`, `G(phi) = L(phi) + R(phi - theta)`, from phi = theta.

    The proximal term is part of *every* step, so that phi approaches the minimiser of G, which is the point the implicit
    gradient differentiates. One gradient a step and one more at the end, for the stationarity. Memory does not depend on
    `steps`: no graph is kept.

    A task stops when `||grad G(phi)|| <= tolerance ||grad G(theta)||`, or when a number of it is not finite; its
    parameters and the rule's state are then frozen, and the others go on as if it were not there.

    Args:
        objective: support loss, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        rule: turns gradients into updates.
        steps: number of steps >= 0.
        tolerance: relative gradient norm in [0, 1) at which a task stops; 0 for the step count alone.
        proximal: the regulariser R; None leaves it out (MAML's inner loop).
        batches: losses of mini-batches; step k descends on number `k % len(batches)` in place of `objective`, which still
            gives loss and stationarity at both ends.
        linearise: phi -> `objective` there with its curvature. The gradient at the end is taken with it, which costs no pass
            more, and its curvature handed on.

    Returns:
        InnerSolution; `steps` counts each task's own; `curvature` is there with `linearise`, unless all tasks stopped early.

    Raises:
        ValueError: `steps` < 0, `tolerance` outside [0, 1), no batch in `batches`, or `batches` with a tolerance, for the
            gradient of a mini-batch does not tell how close a minimum is.

    Source: iMAML algorithm 2, eq. 3-4; mini-batches: Nichol et al. (2018), section 6.2.
    """
    if steps < 0:
        raise ValueError(f"need steps >= 0, got {steps}")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"need 0 <= tolerance < 1, got {tolerance}")
    if batches is not None and (not batches or tolerance > 0.0):
        raise ValueError(
            f"batches need one objective at least and tolerance 0, got {len(batches)} with tolerance={tolerance}"
        )

    problem = InnerProblem(objective, anchor.detach(), proximal)

    def evaluated(phi: Tensor, last: bool) -> tuple[Tensor, Tensor, Matvec | None]:
        if last and linearise is not None:
            return problem.linearised(phi, linearise)
        return *problem.loss_and_gradient(phi), None

    phi = problem.anchor
    on_host = phi.device.type == "cpu"  # reading a flag costs nothing there, and a finished batch leaves early
    with torch.no_grad():
        state = rule.start(phi)
        losses, gradient, curvature = evaluated(phi, last=steps == 0)
        first_loss, first_gradient = losses, gradient  # at phi = theta the proximal term and its gradient vanish
        start_norm = torch.linalg.vector_norm(gradient, dim=-1)
        threshold = tolerance * start_norm if tolerance > 0.0 else torch.full_like(start_norm, -1.0)

        usable = finite(losses, gradient) & start_norm.isfinite()
        active, broken = usable & (start_norm > threshold), ~usable
        taken = torch.zeros_like(losses, dtype=torch.int64)
        for step in range(steps):
            if on_host and not bool(active.any()):
                break
            if batches is not None:
                batch = InnerProblem(batches[step % len(batches)], problem.anchor, proximal)
                _, gradient = batch.loss_and_gradient(phi)
            update, next_state = rule.update(gradient, state, step)
            moved = phi - update
            arrived = active & all_finite(moved)
            broken = broken | (active & ~arrived)
            active = arrived
            if on_host and bool(active.all()):  # as nearly always; spares passes over all parameters
                phi, state = moved, tuple(next_state)
            else:
                phi = _where(active, moved, phi)
                state = tuple(_where(active, new, old) for new, old in zip(next_state, state, strict=True))
            taken = taken + active

            if batches is None:
                losses, gradient, curvature = evaluated(phi, last=step == steps - 1)
                usable = finite(losses, gradient)
                broken = broken | (active & ~usable)
                active = active & usable
                if tolerance > 0.0:
                    active = active & (torch.linalg.vector_norm(gradient, dim=-1) > threshold)
        if batches is not None:
            losses, gradient, curvature = evaluated(phi, last=True)
        outcome = inner_outcome(first_loss, problem.total(losses, phi))
    return InnerSolution(
        params=phi,
        loss=losses,
        stationarity=stationarity(gradient, first_gradient),
        steps=taken,
        outcome=torch.where(broken, int(TaskOutcome.NON_FINITE), outcome),
        curvature=curvature,
    )


def _where(tasks: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows of `tasks`, `old` elsewhere."""
    return torch.where(tasks.reshape(-1, *([1] * (new.dim() - 1))), new, old)
