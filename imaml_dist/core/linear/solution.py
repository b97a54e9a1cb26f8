"""What every linear solver returns: the iterate, how it ended, and how good it truly is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec


class Outcome(IntEnum):
    """How the solve of one task ended. A value, never an exception: one bad task must not stop the others."""

    CONVERGED = 0
    """The residual fell below the tolerance, and the true one is at most `SLACK` times it; without a tolerance (the exact
    solvers): the solve went through."""
    MAX_ITERATIONS = 1
    """The iteration budget was spent first: the normal end with a fixed budget, accepted and counted. Also where a solver's
    recurrence ended below the tolerance but the true residual is above `SLACK` times it: the type's digits were spent first."""
    NEGATIVE_CURVATURE = 2
    """A direction p with p'Ap <= 0 was met: A is not positive definite. `value` is the iterate before it."""
    NON_FINITE = 3
    """The right-hand side or a product was not finite. `value` is the last finite iterate."""


SLACK = 2.0
"""Multiple of the tolerance that the true residual of a converged solve may reach. The recurrence that ended it differs from
the truth by rounding: a solve that is near its last digits lands close above the tolerance, one beyond them far above."""


@dataclass(frozen=True)
class LinearSolution:
    """Result of solving `A_t x_t = b_t` for T tasks at once.

    Attributes:
        value: `[T, P]`, the iterates x.
        outcome: `[T]` int64, `Outcome` codes.
        iterations: `[T]` int64, steps that changed x.
        residual: `[T]`, the true relative residual `||b - A x|| / ||b||`; 0 where b = 0.
        unsolved: `[T]` bool, tasks that got no step at all, so that `value` is the start: the very first met negative curvature
            (or, with MINRES, all of them drowned in rounding); None from solvers that cannot end so.
    """

    value: Tensor
    outcome: Tensor
    iterations: Tensor
    residual: Tensor
    unsolved: Tensor | None = None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per task, `[T, P], [T, P] -> [T]`."""
    return (a * b).sum(-1)


def relative_residual(matvec: Matvec, b: Tensor, x: Tensor) -> Tensor:
    """`||b - A x|| / ||b||` per task, from one product.

    Args:
        matvec: A, `[T, P] -> [T, P]`.
        b: `[T, P]`.
        x: `[T, P]`.

    Returns:
        `[T]`; 0 where b and the residual are both zero.
    """
    return relative_size(b - matvec(x), b)


def relative_size(r: Tensor, b: Tensor) -> Tensor:
    """`||r|| / ||b||` per task, `[T, P], [T, P] -> [T]`, however small or large b is; 0 where both are zero."""
    scale = _power(b)
    return ratio(torch.linalg.vector_norm(r / scale, dim=-1), torch.linalg.vector_norm(b / scale, dim=-1))


def ratio(norm_r: Tensor, norm_b: Tensor) -> Tensor:
    """`norm_r / norm_b`, `[T]`; 0 where both are zero."""
    return torch.where((norm_r == 0) & (norm_b == 0), 0.0, norm_r / norm_b)


def unit(v: Tensor) -> Tensor:
    """The power of two per task, `[T, P] -> [T, 1]`, in which the largest entry of a small v lies in [1, 2); 1 from there on.

    Squares of entries below the root of the smallest number vanish (1e-22 in float32), and a solver would take such a right
    side for zero. All its steps are homogeneous, and a division by a power of two changes no digit, so it may work on
    `v / unit(v)`: the same bits where nothing vanishes, the right ones where something did. What is too large stays so.
    """
    return _power(v).clamp(max=1.0)


def _power(v: Tensor) -> Tensor:
    """The power of two per task, `[T, P] -> [T, 1]`, in which the largest entry of v lies in [1, 2); 1 where it is zero or not finite."""
    largest = torch.linalg.vector_norm(v, ord=torch.inf, dim=-1, keepdim=True)
    power = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where((largest > 0) & largest.isfinite(), power, 1.0)


def tolerance(norm_b: Tensor, units: Tensor, rtol: float, atol: float) -> Tensor:
    """`max(rtol ||b||, atol)` in the units `[T, 1]` that `norm_b` `[T]` is given in, `[T]`."""
    # A number over a tensor is the number times a reciprocal, which overflows for the smallest units.
    return torch.maximum(rtol * norm_b, torch.full_like(norm_b, atol) / units[:, 0])


def end_of_digits(threshold: Tensor, norm_b: Tensor, norm_r: Tensor) -> Tensor:
    """Where a recurrence is followed no further: `max(threshold, eps ||b||, eps ||r||)`, r the first residual; all `[T]`.

    A residual that a recurrence puts below is one of its own only: the iterate has no digits left to follow. Going on all the same,
    its squares come to the smallest numbers of the type, and what is left of their ratios throws the iterate far off. Whether a task
    that ends so has converged is for `judged` to say, by the threshold.
    """
    return torch.maximum(threshold, torch.finfo(norm_b.dtype).eps * torch.maximum(norm_b, norm_r))


def judged(outcome: Tensor, residual: Tensor, threshold: Tensor) -> Tensor:
    """Outcomes `[T]` with CONVERGED taken back where the true residual norm is above `SLACK` times the threshold, both `[T]`."""
    hollow = (outcome == int(Outcome.CONVERGED)) & ~(residual <= SLACK * threshold)
    return torch.where(hollow, int(Outcome.MAX_ITERATIONS), outcome)


def at_once(outcome: Tensor, iterations: Tensor) -> Tensor:
    """Tasks whose very first step met negative curvature, `[T], [T] -> [T]` bool."""
    return (outcome == int(Outcome.NEGATIVE_CURVATURE)) & (iterations == 0)


def check_arguments(b: Tensor, max_iterations: int, rtol: float, atol: float, x0: Tensor | None) -> None:
    """Refuse what no iterative solver can work with.

    Raises:
        ValueError: `max_iterations` < 1, a negative tolerance, or shapes that differ.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if rtol < 0 or atol < 0:
        raise ValueError(f"tolerances must not be negative, got rtol={rtol}, atol={atol}")
    if b.dim() != 2 or (x0 is not None and x0.shape != b.shape):
        raise ValueError(
            f"b must be [T, P] and x0 of its shape, got {tuple(b.shape)}, {x0 if x0 is None else x0.shape}"
        )
