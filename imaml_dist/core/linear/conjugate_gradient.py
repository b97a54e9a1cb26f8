"""Conjugate gradient for T symmetric systems at once, truncated at negative curvature.

Differences from the textbook routine (Hestenes and Stiefel 1952; Nocedal and Wright, algorithm 5.2):

1. Tasks are rows. A task that has ended is frozen by a mask; the others go on. Nothing is read back from the device
   inside the loop, so a GPU never waits for the host.
2. Before every step the curvature `p'Ap` is tested. Where it is not positive, A is not positive definite and the step
   would climb: the task keeps the iterate it has (Steihaug 1983).
3. The residual reported is the true one. The recurrence's `r = b - sum alpha A p` differs from `b - A x` by rounding
   alone, some `eps ||A||` of the way `sum alpha ||p||` that x came (along small eigenvalues it is long). Where it is well
   above that and above `sqrt(eps)` of its own way `sum alpha ||A p||`, as it is unless a solve has nearly come to the end of its
   digits, it is taken, and a product of its own tells elsewhere. Where that says that the recurrence only seemed to
   converge, so does the outcome. Where products are coarser than the type (`precision`), the recurrence adds up their errors
   too, and is never taken.
4. The solve is for the way from the start, in units of the first residual (`unit`), so that a small right side is no zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.linear.solution import (
    LinearSolution,
    Outcome,
    at_once,
    check_arguments,
    dot,
    end_of_digits,
    judged,
    ratio,
    tolerance,
    unit,
)

TRUST = 16.0
"""Multiple of what a product's rounding may have made of the recurrence's residual, above which that is taken for the true one."""


def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    *,
    max_iterations: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    x0: Tensor | None = None,
    preconditioner: Matvec | None = None,
    precision: float | None = None,
) -> LinearSolution:
    """Solve `A_t x_t = b_t` for every task t, A symmetric positive definite.

    Minimises `1/2 x'Ax - b'x` over the Krylov space (eq. 7 of the paper). A task ends when
    `||r|| <= max(rtol ||b||, atol)`, when the type's digits end, when it meets `p'Ap <= eps ||p|| ||Ap||`, when a number is not
    finite, or after `max_iterations` steps. Cost: one product a step, one if `x0` is given, and one more for the true residual
    where rounding could hide in the recurrence's, where products are coarse, or on a GPU, which is never asked whether it could.

    Args:
        matvec: `[T, P] -> [T, P]`, linear and symmetric, row t depending on row t only.
        b: `[T, P]`.
        max_iterations: steps at most, >= 1.
        rtol: relative tolerance on the residual norm, >= 0; 0 with `atol` 0 spends the whole budget or the type's digits.
        atol: absolute tolerance on the residual norm, >= 0.
        x0: `[T, P]`, start; zero when None.
        preconditioner: `[T, P] -> [T, P]`, an approximation of A's inverse, symmetric positive definite.
        precision: relative precision of the products, where it is coarser than that of b's type (`ProximalSystem.precision`).

    Returns:
        LinearSolution. Where `unsolved`, `value` is the start itself. CONVERGED only where the true residual is at most `SLACK`
        times the tolerance; MAX_ITERATIONS where rounding ended the descent before.

    Raises:
        ValueError: `max_iterations` < 1, a negative tolerance, or shapes that differ.

    Source: iMAML section 3.2, eq. 7; Steihaug (1983); Shewchuk, "painless conjugate gradient" (1994), B2-B3.
    """
    check_arguments(b, max_iterations, rtol, atol, x0)
    tiny = torch.finfo(b.dtype).eps
    running, negative = int(Outcome.MAX_ITERATIONS), int(Outcome.NEGATIVE_CURVATURE)
    r = b if x0 is None else b - matvec(x0)
    units = unit(r)
    r = r / units
    target = r if x0 is None else b / units
    norm_b = torch.linalg.vector_norm(target, dim=-1)
    norm = norm_b if x0 is None else torch.linalg.vector_norm(r, dim=-1)
    threshold = tolerance(norm_b, units, rtol, atol)
    end = end_of_digits(threshold, norm_b, norm)

    x = torch.zeros_like(b)  # the way from the start, in these units
    z = r if preconditioner is None else preconditioner(r)
    p, rz = z, dot(r, z)
    finite = rz.isfinite() & norm.isfinite()
    start = None if x0 is None else torch.where(finite[:, None], x0, 0.0)
    done = norm <= end
    active = finite & ~done
    outcome = torch.full_like(rz, running, dtype=torch.int64)
    outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
    outcome = torch.where(finite, outcome, int(Outcome.NON_FINITE))
    iterations = torch.zeros_like(outcome)
    distance = torch.linalg.vector_norm(target - r, dim=-1)  # that r came
    way = torch.zeros_like(norm) if x0 is None else torch.linalg.vector_norm(x0 / units, dim=-1)  # that x came
    steepest = torch.zeros_like(norm)  # a lower bound of ||A||
    # On the CPU reading a flag costs nothing: a finished batch can leave early, and one in which no task has ended is spared the
    # masks. Both give the same result.
    on_host = b.device.type == "cpu"

    def where_active(new: Tensor, old: Tensor | float) -> Tensor:
        return new if on_host and bool(active.all()) else torch.where(active[:, None], new, old)

    for _ in range(max_iterations):
        if on_host and not bool(active.any()):
            break
        # Frozen tasks get a zero direction: whatever they met cannot reach the others through shared arithmetic.
        p = where_active(p, 0.0)
        ap = matvec(p)
        curvature = dot(p, ap)
        stride, length = torch.linalg.vector_norm(p, dim=-1), torch.linalg.vector_norm(ap, dim=-1)
        scale = stride * length
        finite = curvature.isfinite() & scale.isfinite()
        descends = curvature > tiny * scale
        outcome = torch.where(active & ~finite, int(Outcome.NON_FINITE), outcome)
        outcome = torch.where(active & finite & ~descends, negative, outcome)
        active = active & finite & descends

        alpha = torch.where(active, rz / curvature, 0.0)
        x_next = torch.addcmul(x, alpha[:, None], p)
        r_next = torch.addcmul(r, alpha[:, None], ap, value=-1)
        way_next = torch.addcmul(way, alpha.abs(), stride)
        z_next = r_next if preconditioner is None else preconditioner(r_next)
        rz_next = dot(r_next, z_next)
        finite = rz_next.isfinite() & way_next.isfinite()
        outcome = torch.where(active & ~finite, int(Outcome.NON_FINITE), outcome)
        active = active & finite

        x, r = where_active(x_next, x), where_active(r_next, r)
        iterations = iterations + active
        distance = torch.where(active, torch.addcmul(distance, alpha.abs(), length), distance)
        way = torch.where(active, way_next, way)
        steepest = torch.where(active, torch.maximum(steepest, length / stride), steepest)
        done = active & (torch.linalg.vector_norm(r, dim=-1) <= end)
        outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
        active = active & ~done & (rz_next > 0)  # it is not where rounding has made a preconditioner indefinite
        p = torch.addcmul(z_next, torch.where(active, rz_next / rz, 0.0)[:, None], p)
        rz = torch.where(active, rz_next, rz)

    norm = torch.linalg.vector_norm(r, dim=-1)
    # False where anything is not finite.
    trusted = (norm > tiny**0.5 * distance) & (norm > TRUST * tiny * steepest * way)
    if precision is not None and precision > tiny:
        trusted = torch.zeros_like(trusted)
    value = units * x if start is None else torch.addcmul(start, units, x)
    if not (on_host and bool(trusted.all())):
        norm = torch.where(trusted, norm, torch.linalg.vector_norm((b - matvec(value)) / units, dim=-1))
    return LinearSolution(
        value=value,
        outcome=judged(outcome, norm, threshold),
        iterations=iterations,
        residual=ratio(norm, norm_b),
        unsolved=at_once(outcome, iterations),
    )
