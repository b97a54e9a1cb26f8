"""Hessian-free optimisation: Newton steps by conjugate gradient, with a line search and Levenberg-Marquardt damping."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import Linearise, Matvec, Objective, linearise_hessian
from imaml_dist.core.inner.problem import InnerProblem, finite
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.solution import Outcome, dot
from imaml_dist.core.outcome import TaskOutcome, inner_outcome
from imaml_dist.core.proximal.protocol import Proximal

ARMIJO = 1e-4
"""Fraction of the decrease that the slope promises which a step must bring (Nocedal and Wright, eq. 3.4)."""

DAMPING_FACTOR = 1.5
"""The damping grows or falls by this factor from one step to the next (Martens 2010, section 4.1)."""

ROUNDING = 16.0
"""Changes of G below this many units in its last place say nothing; a step of Newton's method is then taken on trust."""


def newton_cg(
    objective: Objective,
    anchor: Tensor,
    *,
    steps: int,
    cg_iterations: int = 5,
    tolerance: float = 0.0,
    proximal: Proximal | None = None,
    linearise: Linearise | None = None,
    damping: float = 1.0,
    halvings: int = 8,
) -> InnerSolution:
    """Minimise `G(phi) = L(phi) + 1/2 (phi - theta)' Lambda (phi - theta)` from phi = theta by truncated Newton steps.

    One step, for every task on its own:

    1. Direction: conjugate gradient on `(C + Lambda + mu I) p = -grad G`, truncated at negative curvature. Where even
       its first step meets negative curvature, p is the steepest descent, of a length that remembers what was accepted last.
    2. Length a: 1, halved until `G(phi + a p) <= G(phi) + 1e-4 a grad G'p`. Where `halvings` do not do, phi stays.
    3. Damping `mu = m ||grad G(phi)|| / ||grad G(theta)||`: m falls by 2/3 where G fell by more than 3/4 of what the
       quadratic model said of the step p, and grows by 3/2 where by less than 1/4, or where there was no such step. As the
       gradient vanishes so does the damping, and Newton's method keeps its quadratic end.

    G never rises beyond rounding. Near the minimum the Hessian converges quadratically; another curvature does so linearly
    at best, and ends at a stationarity of about the square root of the rounding, where G cannot tell up from down.

    Cost of a step: a forward and a differentiable backward pass, whose graph serves all products, `cg_iterations + 1`
    products, and a forward pass for each length tried. Memory does not depend on `steps`.

    Args:
        objective: support loss L, `[T, P] -> [T]`, twice differentiable.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        steps: Newton steps at most, >= 0.
        cg_iterations: products for a direction at most, >= 1; P and more give Newton's own direction.
        tolerance: relative gradient norm in [0, 1) at which a task stops; 0 for the step count alone.
        proximal: the regulariser; None leaves it out.
        linearise: phi `[T, P]` -> L there with its curvature C, for example Gauss-Newton; L's Hessian when None.
        damping: m at the start, >= 0, in units of curvature; 0 switches damping off.
        halvings: of the step length at most, >= 0.

    Returns:
        InnerSolution; `steps` counts the steps that moved the task, `curvature` multiplies with C at the final phi.

    Raises:
        ValueError: an argument outside its range.

    Source: iMAML section 4 ("Hessian-free"); Martens (2010); Nocedal and Wright, algorithm 7.1; damping proportional to
    the gradient norm: Li, Fukushima, Qi and Yamashita (2004).
    """
    if steps < 0 or cg_iterations < 1 or halvings < 0:
        raise ValueError(
            f"need steps >= 0, cg_iterations >= 1 and halvings >= 0, got {steps}, {cg_iterations} and {halvings}"
        )
    if not 0.0 <= tolerance < 1.0 or not 0.0 <= damping < float("inf"):
        raise ValueError(f"need 0 <= tolerance < 1 and 0 <= damping < inf, got {tolerance} and {damping}")

    problem = InnerProblem(objective, anchor.detach(), proximal)
    phi = problem.anchor
    linearise = linearise or (lambda at: linearise_hessian(objective, at))
    losses, gradient, curvature = problem.linearised(phi, linearise)
    first_loss, first_gradient = losses, gradient
    first_norm = torch.linalg.vector_norm(gradient, dim=-1)
    threshold = tolerance * first_norm if tolerance > 0.0 else torch.full_like(first_norm, -1.0)

    usable = finite(losses, gradient) & first_norm.isfinite()
    active, broken = usable & (first_norm > threshold), ~usable
    taken = torch.zeros_like(losses, dtype=torch.int64)
    strength, reach = torch.full_like(losses, damping), torch.ones_like(losses)
    on_host = phi.device.type == "cpu"  # reading a flag costs nothing there, and a finished batch leaves early
    for _ in range(steps):
        if on_host and not bool(active.any()):
            break
        downhill = torch.where(active[:, None], -gradient, 0.0)
        mu = torch.where(active, strength * stationarity(gradient, first_gradient), 0.0)
        solution = conjugate_gradient(_system(curvature, proximal, mu), downhill, max_iterations=cg_iterations)
        newton = (solution.iterations > 0) | (solution.outcome == int(Outcome.CONVERGED))
        direction = torch.where(newton[:, None], solution.value, reach[:, None] * downhill)

        start = problem.total(losses, phi)
        slope = -dot(downhill, direction)
        noise = ROUNDING * torch.finfo(start.dtype).eps * start.abs()
        length, accepted, full = _line_search(problem, phi, direction, start, slope, noise, halvings)

        # A CG iterate x from 0 solves A x = b on its Krylov space, so b'x = x'Ax and no product is needed for the model.
        promised = 0.5 * (mu * dot(direction, direction) - slope)
        ratio = (start - full) / promised
        known = promised > noise
        lower = newton & known & (ratio > 0.75)
        higher = ~newton | (known & ~(ratio >= 0.25)) | ~accepted
        strength = torch.where(
            lower, strength / DAMPING_FACTOR, torch.where(higher, strength * DAMPING_FACTOR, strength)
        )
        reach = torch.where(newton, reach, reach * length * torch.where(accepted, 2.0, 1.0))

        moves = active & accepted
        phi = torch.where(moves[:, None], phi + length[:, None] * direction, phi)
        taken = taken + moves
        del solution, curvature  # so that only one linearisation is alive at a time
        losses, gradient, curvature = problem.linearised(phi, linearise)
        usable = finite(losses, gradient)
        broken = broken | (active & ~usable)
        active = active & usable & (torch.linalg.vector_norm(gradient, dim=-1) > threshold)

    outcome = inner_outcome(first_loss, problem.total(losses, phi))
    return InnerSolution(
        params=phi,
        loss=losses,
        stationarity=stationarity(gradient, first_gradient),
        steps=taken,
        outcome=torch.where(broken, int(TaskOutcome.NON_FINITE), outcome),
        curvature=curvature,
    )


def _system(curvature: Matvec, proximal: Proximal | None, mu: Tensor) -> Matvec:
    """`p -> (C + Lambda + mu I) p` with a damping for each task."""

    def product(p: Tensor) -> Tensor:
        ap = curvature(p) + mu[:, None] * p
        return ap if proximal is None else proximal.add_to(ap, p)

    return product


def _line_search(
    problem: InnerProblem, phi: Tensor, direction: Tensor, start: Tensor, slope: Tensor, noise: Tensor, halvings: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Armijo's lengths `[T]`, whether one was found `[T]`, and G at length 1 `[T]`; the last length tried where none was."""
    length = torch.ones_like(start)
    accepted = torch.zeros_like(start, dtype=torch.bool)
    full = start
    for trial in range(halvings + 1):
        with torch.no_grad():
            moved = phi + length[:, None] * direction
            value = problem.total(problem.objective(moved), moved)
        full = value if trial == 0 else full
        # Comparisons with nan are false, so a length at which G is not finite is halved.
        accepted = accepted | (value <= start + ARMIJO * length * slope + noise)
        if phi.device.type == "cpu" and bool(accepted.all()):
            break
        if trial < halvings:
            length = torch.where(accepted, length, 0.5 * length)
    return length, accepted, full
