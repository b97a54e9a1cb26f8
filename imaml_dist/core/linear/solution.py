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
    """The residual fell below the tolerance."""
    MAX_ITERATIONS = 1
    """The iteration budget was spent first: the normal end with a fixed budget, accepted and counted."""
    NEGATIVE_CURVATURE = 2
    """A direction p with p'Ap <= 0 was met: A is not positive definite. `value` is the iterate before it."""
    NON_FINITE = 3
    """The right-hand side or a product was not finite. `value` is the last finite iterate."""


@dataclass(frozen=True)
class LinearSolution:
    """Result of solving `A_t x_t = b_t` for T tasks at once.

    Attributes:
        value: `[T, P]`, the iterates x.
        outcome: `[T]` int64, `Outcome` codes.
        iterations: `[T]` int64, steps that changed x.
        residual: `[T]`, the true relative residual `||b - A x|| / ||b||`; 0 where b = 0.
    """

    value: Tensor
    outcome: Tensor
    iterations: Tensor
    residual: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per task, `[T, P], [T, P] -> [T]`."""
    return (a * b).sum(-1)


def relative_residual(matvec: Matvec, b: Tensor, x: Tensor) -> Tensor:
    """`||b - A x|| / ||b||` per task, `[T]`; 0 where b and the residual are both zero."""
    norm_r, norm_b = torch.linalg.vector_norm(b - matvec(x), dim=-1), torch.linalg.vector_norm(b, dim=-1)
    return torch.where((norm_r == 0) & (norm_b == 0), 0.0, norm_r / norm_b)


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
