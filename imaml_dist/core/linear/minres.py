"""Minimal residuals for T symmetric systems at once, indefinite ones too."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.linear.solution import (
    LinearSolution,
    Outcome,
    check_arguments,
    dot,
    end_of_digits,
    judged,
    ratio,
    tolerance,
    unit,
)

DOUBT = 0.4
"""Power of eps: a residual that A shrinks so much lies where A is as good as singular. At 0.5, the basis of some systems had lost its
orthogonality before."""


def minres(
    matvec: Matvec,
    b: Tensor,
    *,
    max_iterations: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    x0: Tensor | None = None,
    preconditioner: Matvec | None = None,
) -> LinearSolution:
    """`A_t x_t = b_t` for every task t, A symmetric: the x in the Krylov space with the smallest `||b - A x||`.

    A Lanczos process builds an orthogonal basis in which A is tridiagonal; Givens rotations turn that into a triangle as
    it grows. Positive definiteness is not needed, so negative curvature is no obstacle. In exact arithmetic the residual never
    grows; in rounded arithmetic the basis loses its orthogonality, and on ill-conditioned systems (about 1e5 in float32) x can
    end far from where the recurrence believes; on a singular system without a solution every step beyond the best divides by
    rounding. So the first iterate that may be the best there, with `||A r|| <= eps^0.4 ||A|| ||r||`, is kept, and is the result unless the
    last one's true residual is smaller by more than the rounding in it, `eps ||A|| ||x||`. Never a worse iterate than the start.

    A task ends when its residual norm is at most `max(rtol ||b||, atol)` (both in the norm of the preconditioner where there
    is one), when the type's digits end, when the Krylov space is exhausted, when a number is not finite, or after `max_iterations`.
    Cost: one product an iteration, one or two for the true residual, and one if `x0` is given.

    Args:
        matvec: `[T, P] -> [T, P]`, linear and symmetric, row t depending on row t only.
        b: `[T, P]`.
        max_iterations: >= 1.
        rtol: relative tolerance on the residual norm, >= 0.
        atol: absolute tolerance on the residual norm, >= 0.
        x0: `[T, P]`, start; zero when None.
        preconditioner: `[T, P] -> [T, P]`, an approximation of the inverse of |A|, symmetric positive definite.

    Returns:
        LinearSolution; never NEGATIVE_CURVATURE. CONVERGED only where the true residual is at most `SLACK` times the tolerance;
        where it is larger than the start's, `value` is the start, with 0 iterations and MAX_ITERATIONS, and `unsolved` says so.
        On a singular system without a solution `value` minimises the residual.

    Raises:
        ValueError: `max_iterations` < 1, a negative tolerance, or shapes that differ.

    Source: Paige and Saunders, "Solution of sparse indefinite systems of linear equations" (1975).
    """
    check_arguments(b, max_iterations, rtol, atol, x0)
    precondition = preconditioner or (lambda v: v)
    tiny = torch.finfo(b.dtype).eps
    zero = torch.zeros_like(b)

    r = b if x0 is None else b - matvec(x0)
    units = unit(r)
    r = r / units
    target = r if x0 is None else b / units
    z = precondition(r)
    beta = dot(r, z).sqrt()  # nan where the preconditioner is not positive definite
    size_b = dot(target, precondition(target)).sqrt() if x0 is not None else beta
    threshold = tolerance(size_b, units, rtol, atol)
    finite = beta.isfinite()
    start = zero if x0 is None else torch.where(finite[:, None], x0, 0.0)
    first_norm, first_size = torch.linalg.vector_norm(r, dim=-1), beta
    x = zero  # the way from the start, in these units
    end = end_of_digits(threshold, size_b, beta)
    done = finite & (beta <= end)
    active = finite & ~done
    outcome = torch.full_like(beta, int(Outcome.MAX_ITERATIONS), dtype=torch.int64)
    outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
    outcome = torch.where(finite, outcome, int(Outcome.NON_FINITE))
    iterations = torch.zeros_like(outcome)
    on_host = b.device.type == "cpu"

    r_previous, beta_previous = zero, torch.ones_like(beta)
    w, w_previous = zero, zero
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    dbar, epsilon, phibar = torch.zeros_like(beta), torch.zeros_like(beta), beta
    # ||A|| as the preconditioner has it, and as it is.
    largest, stretch = torch.zeros_like(beta), torch.zeros_like(beta)
    doubted, kept, kept_size, kept_iterations = torch.zeros_like(done), x, beta, iterations
    for _ in range(max_iterations):
        if on_host and not bool(active.any()):
            break
        safe = torch.where(active, beta, 1.0)[:, None]
        v = torch.where(active[:, None], z / safe, 0.0)
        y = matvec(v)
        alpha = dot(v, y)
        stretched = torch.linalg.vector_norm(y, dim=-1) / torch.linalg.vector_norm(v, dim=-1)
        stretch = torch.where(active, torch.maximum(stretch, stretched), stretch)
        y = y - alpha[:, None] * r / safe - (beta / beta_previous)[:, None] * r_previous
        z_next = precondition(y)
        squared = dot(y, z_next)
        ok = alpha.isfinite() & squared.isfinite() & (squared >= 0)
        beta_next = torch.where(ok, squared, 0.0).sqrt()
        outcome = torch.where(active & ~ok, int(Outcome.NON_FINITE), outcome)
        active = active & ok

        # The previous rotation acts on the new column of the tridiagonal matrix; a new one removes what is below it.
        delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
        epsilon_next, dbar_next = sine * beta_next, -cosine * beta_next
        gamma = torch.hypot(gbar, beta_next)
        largest = torch.maximum(largest, torch.where(active, gamma, 0.0))
        exhausted = beta_next <= 10 * tiny * largest
        singular = gamma <= 10 * tiny * largest  # nothing in this direction lowers the residual
        doubtful = active & ~doubted & (torch.hypot(gbar, dbar_next) <= tiny**DOUBT * largest)
        if not on_host or bool(doubtful.any()):
            kept = torch.where(doubtful[:, None], x, kept)
            kept_size = torch.where(doubtful, phibar.abs(), kept_size)
            kept_iterations = torch.where(doubtful, iterations, kept_iterations)
            doubted = doubted | doubtful
        moves = active & ~singular
        gamma = torch.where(moves, gamma, 1.0)
        cosine_next, sine_next = gbar / gamma, beta_next / gamma
        w_next = (v - epsilon[:, None] * w_previous - delta[:, None] * w) / gamma[:, None]
        step = cosine_next * phibar
        x = torch.where(moves[:, None], x + step[:, None] * w_next, x)
        iterations = iterations + moves
        phibar = torch.where(moves, sine_next * phibar, phibar)

        done = active & ((phibar.abs() <= end) | (exhausted & ~singular))
        outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
        active = active & ~done & ~singular

        keep = active[:, None]
        r_previous, r = torch.where(keep, r, 0.0), torch.where(keep, y, 0.0)
        z = torch.where(keep, z_next, 0.0)
        beta_previous, beta = torch.where(active, beta, 1.0), torch.where(active, beta_next, 1.0)
        w_previous, w = torch.where(keep, w, 0.0), torch.where(keep, w_next, 0.0)
        cosine, sine = torch.where(active, cosine_next, -1.0), torch.where(active, sine_next, 0.0)
        dbar, epsilon = torch.where(active, dbar_next, 0.0), torch.where(active, epsilon_next, 0.0)

    def measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.addcmul(start, units, x)
        r = (b - matvec(value)) / units
        return value, torch.linalg.vector_norm(r, dim=-1), dot(r, precondition(r)).sqrt()

    value, norm, size = measured(x)
    rounding = tiny * stretch * torch.linalg.vector_norm(value / units, dim=-1) * ratio(size, norm)
    worse = doubted & ~(size + rounding <= kept_size)
    if not on_host or bool(worse.any()):
        value, norm, size = measured(torch.where(worse[:, None], kept, x))
        iterations = torch.where(worse, kept_iterations, iterations)
    spoiled = (outcome != int(Outcome.NON_FINITE)) & ~(size <= first_size)
    outcome = torch.where(spoiled, int(Outcome.MAX_ITERATIONS), judged(outcome, size, threshold))
    iterations = torch.where(spoiled, 0, iterations)
    return LinearSolution(
        value=torch.where(spoiled[:, None], start, value),
        outcome=outcome,
        iterations=iterations,
        residual=ratio(torch.where(spoiled, first_norm, norm), torch.linalg.vector_norm(target, dim=-1)),
        unsolved=(outcome == int(Outcome.MAX_ITERATIONS)) & (iterations == 0),
    )
