"""The truncated Neumann series for T positive definite systems at once, kept from diverging."""

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


def neumann(
    matvec: Matvec,
    b: Tensor,
    *,
    max_iterations: int,
    scale: float | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    x0: Tensor | None = None,
) -> LinearSolution:
    """`x <- x + s (b - A x)`: after K iterations from zero the partial sum `s sum_{k<K} (I - s A)^k b` of the inverse's series.

    It converges for `0 < s < 2 / max eig A` and A positive definite. With r the residual,
    `||r_next||^2 = ||r||^2 - 2 s r'Ar + s^2 ||Ar||^2`, so the product at hand tells what the step would do:

    - where `r'Ar` is not positive, A is not positive definite: the task keeps its iterate, NEGATIVE_CURVATURE;
    - where the residual would grow, the task's s is shrunk for good to `r'Ar / ||Ar||^2`, which is never below
      `1 / max eig A`. A fixed s that converges is left alone.

    Cost: one product an iteration, one for the true residual, and one if `x0` is given.

    Args:
        matvec: `[T, P] -> [T, P]`, linear and symmetric, row t depending on row t only.
        b: `[T, P]`.
        max_iterations: K >= 1.
        scale: s > 0; None begins with `r'Ar / ||Ar||^2` of the first residual.
        rtol: relative tolerance on the residual norm, >= 0.
        atol: absolute tolerance on the residual norm, >= 0.
        x0: `[T, P]`, start; zero when None.

    Returns:
        LinearSolution. CONVERGED only where the true residual is at most `SLACK` times the tolerance.

    Raises:
        ValueError: `max_iterations` < 1, a negative tolerance, `scale` <= 0, or shapes that differ.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation" (2020).
    """
    check_arguments(b, max_iterations, rtol, atol, x0)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    tiny = torch.finfo(b.dtype).eps
    r = b if x0 is None else b - matvec(x0)
    units = unit(r)
    r = r / units
    norm_b = torch.linalg.vector_norm(b / units, dim=-1)
    threshold = tolerance(norm_b, units, rtol, atol)
    x = torch.zeros_like(b)  # the way from the start, in these units
    norm = torch.linalg.vector_norm(r, dim=-1)
    finite = norm.isfinite()
    start = None if x0 is None else torch.where(finite[:, None], x0, 0.0)
    end = end_of_digits(threshold, norm_b, norm)
    done = finite & (norm <= end)
    active = finite & ~done
    outcome = torch.full_like(norm, int(Outcome.MAX_ITERATIONS), dtype=torch.int64)
    outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
    outcome = torch.where(finite, outcome, int(Outcome.NON_FINITE))
    iterations = torch.zeros_like(outcome)
    s = torch.full_like(norm, torch.inf if scale is None else scale)
    on_host = b.device.type == "cpu"
    way = torch.zeros_like(norm)  # that x came

    for _ in range(max_iterations):
        if on_host and not bool(active.any()):
            break
        r = torch.where(active[:, None], r, 0.0)
        ar = matvec(r)
        curvature, length = dot(r, ar), torch.linalg.vector_norm(ar, dim=-1)
        finite = curvature.isfinite() & length.isfinite()
        positive = curvature > tiny * norm * length
        outcome = torch.where(active & ~finite, int(Outcome.NON_FINITE), outcome)
        outcome = torch.where(active & finite & ~positive, int(Outcome.NEGATIVE_CURVATURE), outcome)
        active = active & finite & positive

        steepest = curvature / length / length  # not over a square, which may vanish
        s = torch.where(active & (s > 2 * steepest), steepest, s)
        way_next = way + s * norm
        finite = way_next.isfinite()
        outcome = torch.where(active & ~finite, int(Outcome.NON_FINITE), outcome)
        active = active & finite
        way = torch.where(active, way_next, way)
        step = torch.where(active, s, 0.0)[:, None]
        x = torch.where(active[:, None], x + step * r, x)
        r = torch.where(active[:, None], r - step * ar, 0.0)
        norm = torch.linalg.vector_norm(r, dim=-1)
        iterations = iterations + active
        done = active & (norm <= end)
        outcome = torch.where(done, int(Outcome.CONVERGED), outcome)
        active = active & ~done

    value = units * x if start is None else torch.addcmul(start, units, x)
    norm = torch.linalg.vector_norm((b - matvec(value)) / units, dim=-1)
    return LinearSolution(
        value=value,
        outcome=judged(outcome, norm, threshold),
        iterations=iterations,
        residual=ratio(norm, norm_b),
        unsolved=at_once(outcome, iterations),
    )
