"""The extreme eigenvalues of T symmetric operators at once, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.linear.solution import dot

BREAKDOWN = 10.0
"""A new direction shorter than this many units in the last place of the operator's size, times sqrt(P), is rounding."""


@dataclass(frozen=True)
class Ritz:
    """Extreme Ritz values of T operators, one `[T]` tensor per fact; nan where a task's numbers were not finite.

    A Ritz value is never outside of the spectrum: `smallest` is at least the smallest eigenvalue, `largest` at most the
    largest. So a `smallest` that is negative beyond rounding proves that the operator is not positive definite. A positive one alone
    says nothing: eigenvalues below it may be yet to be found. With a bound smaller than itself it has found a positive eigenvalue,
    and that this is the smallest is as likely as the start has a part along every eigenvector.

    Attributes:
        smallest, largest: the Ritz values.
        smallest_bound, largest_bound: `|beta_k s_k|`, within which of the Ritz value an eigenvalue lies.
        rounding: what products and sums in the type may have added to a Ritz value.
        steps: int64, the dimension of the Krylov space; less than asked for where it is invariant, and the bounds then about 0.
    """

    smallest: Tensor
    largest: Tensor
    smallest_bound: Tensor
    largest_bound: Tensor
    rounding: Tensor
    steps: Tensor

    @property
    def positive(self) -> Tensor:
        """Operators that are positive definite as far as the steps can tell, `smallest - smallest_bound > rounding`: `[T]` bool."""
        return self.smallest - self.smallest_bound > self.rounding

    @property
    def not_positive(self) -> Tensor:
        """Operators that are proved not to be positive definite, `smallest < -rounding`: `[T]` bool."""
        return self.smallest < -self.rounding


def lanczos(matvec: Matvec, start: Tensor, steps: int) -> Ritz:
    """Smallest and largest Ritz value of `A_t` on the Krylov space of `start_t`, for every task t.

    `A Q = Q T + beta_k q_{k+1} e_k'`, Q orthonormal from `q_1 = start / ||start||`, T tridiagonal with `alpha` on and `beta`
    beside its diagonal. An eigenpair `T s = theta s` gives `||A Q s - theta Q s|| = |beta_k s_k|`, s_k the last entry of s.
    Every new direction is made orthogonal to all of Q twice, so that no Ritz value appears twice.

    A task ends where its Krylov space is invariant, or where a number of it is not finite; the others go on with the bits they
    have beside a good one. Cost: a product and `4 k P` multiplications in step k; memory: `steps` vectors a task.

    Args:
        matvec: A, `[T, P] -> [T, P]`, linear and symmetric, row t depending on row t only.
        start: `[T, P]`, not zero; best random, for an eigenvector that is orthogonal to it is not found.
        steps: products, >= 1; more than P are not needed and not made.

    Returns:
        Ritz, in the type of `start`; float64 is recommended. A task whose start is zero has no Ritz value: nan.

    Raises:
        ValueError: `steps` < 1, or `start` is not a matrix.

    Source: Golub and Van Loan, "Matrix Computations", section 10.1 and 10.3; Parlett, "The Symmetric Eigenvalue Problem",
    sections 11.4 and 13.2.
    """
    if steps < 1 or start.dim() != 2:
        raise ValueError(f"need steps >= 1 and start [T, P], got {steps} and shape {tuple(start.shape)}")
    tasks, size = start.shape
    steps = min(steps, size)
    basis = start.new_zeros(steps, tasks, size)
    alpha, beta = start.new_zeros(steps, tasks), start.new_zeros(steps, tasks)
    norm = torch.linalg.vector_norm(start, dim=-1)
    finite = norm.isfinite() & (norm > 0)
    active, taken = finite, torch.zeros(tasks, dtype=torch.int64, device=start.device)
    q = torch.where(active[:, None], start / norm[:, None], 0.0)
    scale = torch.zeros_like(norm)
    rounding = BREAKDOWN * torch.finfo(start.dtype).eps * size**0.5
    for k in range(steps):
        if not bool(active.any()):
            break
        basis[k] = q
        w = matvec(q)
        usable = torch.linalg.vector_norm(w, dim=-1).isfinite()
        finite, active = finite & (usable | ~active), active & usable
        w = torch.where(active[:, None], w, 0.0)
        alpha[k] = dot(q, w)
        for _ in range(2):
            w = w - _within(basis[: k + 1], w)
        length = torch.linalg.vector_norm(w, dim=-1)
        beta[k], taken = length, taken + active
        scale = torch.maximum(scale, alpha[k].abs() + length)
        active = active & (length > rounding * scale)
        q = torch.where(active[:, None], w / torch.where(active, length, 1.0)[:, None], 0.0)

    ends = [_extremes(alpha[:k, t], beta[:k, t]) if good else None for t, (k, good) in enumerate(_pairs(taken, finite))]
    nothing = start.new_full((4,), torch.nan)
    table = torch.stack([nothing if found is None else found for found in ends])
    smallest, largest, smallest_bound, largest_bound = table.unbind(1)
    return Ritz(smallest, largest, smallest_bound, largest_bound, rounding * scale, taken)


def _within(basis: Tensor, w: Tensor) -> Tensor:
    """`Q Q'w`: the part of w `[T, P]` in the span of the basis `[k, T, P]`."""
    return torch.einsum("ktp,kt->tp", basis, torch.einsum("ktp,tp->kt", basis, w))


def _pairs(taken: Tensor, finite: Tensor) -> list[tuple[int, bool]]:
    return list(zip(taken.tolist(), finite.tolist(), strict=True))


def _extremes(alpha: Tensor, beta: Tensor) -> Tensor:
    """Smallest and largest eigenvalue of T, and the bound of each, from its diagonal `[k]` and `beta_1 .. beta_k`."""
    beside = torch.diag(beta[:-1], 1)
    values, vectors = torch.linalg.eigh(torch.diag(alpha) + beside + beside.mT)
    bounds = (beta[-1] * vectors[-1]).abs()
    return torch.stack([values[0], values[-1], bounds[0], bounds[-1]])
