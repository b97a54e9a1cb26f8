"""L-BFGS on the proximal inner problem: curvature learned from the gradients themselves, one gradient a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imaml_dist.core.curvature import Linearise, Matvec, Objective
from imaml_dist.core.inner.newton_cg import ARMIJO, ROUNDING
from imaml_dist.core.inner.problem import InnerProblem, finite
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.linear.solution import dot
from imaml_dist.core.outcome import TaskOutcome, inner_outcome
from imaml_dist.core.proximal.protocol import Proximal

FLATTEST = 1e-6
"""A pair is kept where `s'y` is above this fraction of `|s| |y|`; below zero, along negative curvature, B would not stay positive."""

SHORTEST = 2.0**-10
"""A direction whose step was halved below this length is given up for steepest descent, and the pairs that it came from with it."""

Pair = tuple[Tensor, Tensor, Tensor]
"""A step s, the change y of the gradient along it, both `[T, P]`, and `1 / s'y` `[T]`, which is 0 where a task has no such pair."""


def lbfgs(
    objective: Objective,
    anchor: Tensor,
    *,
    steps: int,
    lr: float = 0.1,
    memory: int = 5,
    tolerance: float = 0.0,
    proximal: Proximal | None = None,
    linearise: Linearise | None = None,
) -> InnerSolution:
    """Minimise `G(phi) = L(phi) + R(phi - theta)` from phi = theta by at most `steps` quasi-Newton steps.

    The direction p is `-B grad G`, where B is what the BFGS update makes of `c M`, `M = m Lambda^-1` with m the smallest entry of
    Lambda's diagonal, and a task's last `memory` pairs of steps s and gradient changes y, `c = s'y / y'M y` of the newest one (`lr`
    before there is one). M is the identity where Lambda is one number for all; where it is not, it is the part of the inverse
    Hessian that is known beforehand, and the pairs have only the loss's few directions to learn.

    A step of length 1 is tried first; where `G(phi + a p) <= G(phi) + 1e-4 a grad G'p` does not hold at length a, beyond what
    rounding makes of G, phi stays and the next step tries half the length. Every step is therefore one gradient, whatever becomes of
    it, and tasks whose steps are accepted never wait for those whose are not. Pairs with `s'y <= 0`, as negative curvature gives,
    are left out, so B stays positive definite; a direction that is no descent in rounding, or along which no length does, makes way
    for `-c M grad G` and its task forgets its pairs.

    Cost of a step: a gradient and `4 memory + 6` passes over `[T, P]`, two more and two or three of `Lambda^-1` with a Lambda that
    is not one number. Memory: `2 memory` vectors of that size. The curvature that is handed on comes with the last gradient where
    every task that still moves takes the last step, else with one more.

    Args:
        objective: support loss L, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        steps: gradients besides the first, >= 0.
        lr: the first step is `-lr M grad G`, > 0.
        memory: pairs kept, >= 1.
        tolerance: relative gradient norm in [0, 1) at which a task stops; 0 for the step count alone.
        proximal: the regulariser R; None leaves it out.
        linearise: phi -> L there with its curvature, which is then handed on.

    Returns:
        InnerSolution; `steps` counts the gradients a task has used, `curvature` is there with `linearise`.

    Raises:
        ValueError: an argument outside its range.

    Source: Nocedal and Wright, "Numerical Optimization" (2006), algorithms 7.4 and 7.5.
    """
    if steps < 0 or memory < 1 or not 0.0 < lr < float("inf"):
        raise ValueError(f"need steps >= 0, memory >= 1 and 0 < lr < inf, got {steps}, {memory} and {lr}")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"need 0 <= tolerance < 1, got {tolerance}")
    problem = InnerProblem(objective, anchor.detach(), proximal)
    metric = _metric(proximal)

    def evaluated(at: Tensor, last: bool) -> tuple[Tensor, Tensor, Matvec | None]:
        if last and linearise is not None:
            return problem.linearised(at, linearise)
        return *problem.loss_and_gradient(at), None

    phi = problem.anchor
    on_host = phi.device.type == "cpu"  # reading a flag costs nothing there, and a finished batch leaves early
    losses, gradient, curvature = evaluated(phi, last=steps == 0)
    value, first_loss, first_gradient = problem.total(losses, phi), losses, gradient
    start_norm = torch.linalg.vector_norm(gradient, dim=-1)
    threshold = tolerance * start_norm if tolerance > 0.0 else torch.full_like(start_norm, -1.0)
    usable = finite(losses, gradient) & start_norm.isfinite()
    active, broken = usable & (start_norm > threshold), ~usable
    taken = torch.zeros_like(losses, dtype=torch.int64)
    pairs: list[Pair] = []
    scale, length = torch.full_like(losses, lr), torch.ones_like(losses)
    direction = torch.where(active[:, None], -lr * metric(gradient), 0.0)
    for step in range(steps):
        if on_host and not bool(active.any()):
            break
        tried = phi + length[:, None] * direction
        tried_losses, tried_gradient, curvature = evaluated(tried, last=on_host and step == steps - 1)
        tried_value = problem.total(tried_losses, tried)
        noise = ROUNDING * torch.finfo(value.dtype).eps * value.abs()
        # Comparisons with nan are false, so a length at which G is not finite is halved.
        better = tried_value <= value + ARMIJO * length * dot(gradient, direction) + noise
        accepted = active & better & finite(tried_losses, tried_gradient)
        taken = taken + active
        if not (on_host and bool((accepted | ~active).all())):
            curvature = None  # it is that of what was tried
            tried = torch.where(accepted[:, None], tried, phi)
            tried_gradient = torch.where(accepted[:, None], tried_gradient, gradient)
            tried_losses = torch.where(accepted, tried_losses, losses)
            tried_value = torch.where(accepted, tried_value, value)
        s, y = tried - phi, tried_gradient - gradient
        sy, yy = dot(s, y), dot(y, y)
        known = accepted & (sy > FLATTEST * (dot(s, s) * yy).sqrt())
        phi, losses, gradient, value = tried, tried_losses, tried_gradient, tried_value
        active = active & (torch.linalg.vector_norm(gradient, dim=-1) > threshold)
        if step == steps - 1:
            break
        pairs = _kept(pairs, (s, y, torch.where(known, 1.0 / sy, 0.0)), known | ~active, memory)
        along = metric(y)
        scale = torch.where(known, sy / (yy if along is y else dot(y, along)), scale)
        length = torch.where(accepted, 1.0, 0.5 * length)
        fresh = torch.where(accepted[:, None], -_two_loops(gradient, pairs, scale, metric), direction)
        lost = active & ((length < SHORTEST) & _has_any(pairs, length) | (dot(fresh, gradient) >= 0))
        if not on_host or bool(lost.any()):
            fresh = torch.where(lost[:, None], -scale[:, None] * metric(gradient), fresh)
            length = torch.where(lost, 1.0, length)
            pairs = [(s, y, torch.where(lost, 0.0, inverse)) for s, y, inverse in pairs]
        direction = torch.where(active[:, None], fresh, 0.0)
    if linearise is not None and curvature is None:
        curvature = problem.linearised(phi, linearise)[2]
    outcome = inner_outcome(first_loss, value)
    return InnerSolution(
        params=phi,
        loss=losses,
        stationarity=stationarity(gradient, first_gradient),
        steps=taken,
        outcome=torch.where(broken, int(TaskOutcome.NON_FINITE), outcome),
        curvature=curvature,
    )


def _kept(pairs: list[Pair], newest: Pair, known: Tensor, memory: int) -> list[Pair]:
    """Every task's last `memory` pairs, oldest first; a task whose newest pair is of no use keeps those it has."""
    if known.device.type == "cpu" and bool(known.all()):
        return [*pairs, newest][-memory:]
    if len(pairs) < memory:
        none = torch.zeros_like(newest[2])
        empty = (torch.zeros_like(newest[0]), torch.zeros_like(newest[1]), none)
        pairs = [*([empty] * (memory - len(pairs))), *pairs]
    moved = [*pairs[1:], newest]
    rows = known[:, None]
    return [
        (torch.where(rows, a[0], b[0]), torch.where(rows, a[1], b[1]), torch.where(known, a[2], b[2]))
        for a, b in zip(moved, pairs, strict=True)
    ]


def _has_any(pairs: list[Pair], like: Tensor) -> Tensor:
    """Tasks that have a pair, `[T]` bool."""
    found = torch.zeros_like(like, dtype=torch.bool)
    for _, _, inverse in pairs:
        found = found | (inverse != 0)
    return found


def _metric(proximal: Proximal | None) -> Callable[[Tensor], Tensor]:
    """`v -> M v`."""
    if proximal is None or (strengths := proximal.diagonal()).numel() == 1:
        return lambda v: v
    weakest = strengths.min()
    return lambda v: weakest * proximal.solve(v)


def _two_loops(gradient: Tensor, pairs: list[Pair], scale: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """`B grad G`, `[T, P]`."""
    q, weights = gradient, []
    for s, y, inverse in reversed(pairs):
        weight = inverse * dot(s, q)
        weights.append(weight)
        q = torch.addcmul(q, weight[:, None], y, value=-1.0)
    q = scale[:, None] * metric(q)
    for (s, y, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q = torch.addcmul(q, (weight - inverse * dot(y, q))[:, None], s)
    return q
