"""Randomised low-rank approximation of the curvature: as a solver, and as a preconditioner for conjugate gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.eigen import eigh
from imaml_dist.core.linear.solution import LinearSolution, Outcome, relative_residual
from imaml_dist.core.linear.system import ProximalSystem


@dataclass(frozen=True)
class LowRank:
    """`C ~ Z D^-1 Z'` per task, with `Z` `[T, P, r]` and `D` `[T, r]`; columns left out are zero and have D = 1."""

    columns: Tensor
    eigenvalues: Tensor

    def solve(self, system: ProximalSystem, b: Tensor) -> Tensor:
        """`(Z D^-1 Z' + B)^-1 b` with `B = Lambda + mu I`, by the Woodbury identity: an r x r system per task."""
        z, inverse_z = self.columns.mT, system.regulariser_solve(self.columns.mT)
        inner = torch.diag_embed(self.eigenvalues) + z @ inverse_z.mT
        start = system.regulariser_solve(b)
        coefficients, _ = torch.linalg.solve_ex(inner, torch.einsum("trp,tp->tr", z, start).unsqueeze(-1))
        return start - torch.einsum("trp,tr->tp", inverse_z, coefficients.squeeze(-1))


def low_rank_curvature(curvature: Matvec, like: Tensor, *, rank: int, seed: int = 0, positive: bool = False) -> LowRank:
    """Nystrom approximation of each task's curvature from `rank` products with random orthonormal directions.

    With `Omega` `[P, r]` and `Y = C Omega`, `W = Omega'Y = Q diag(d) Q'`, it is `(Y Q) diag(d)^-1 (Y Q)'`, exact at r = P.
    Directions whose d is lost in rounding are left out. Omega is a function of (P, r, seed, type) alone: the same for all
    tasks and on all workers.

    Args:
        curvature: `[T, P] -> [T, P]`, symmetric.
        like: `[T, P]`, for shape, type and device.
        rank: r, 1..P.
        seed: of Omega.
        positive: leave out negative d too, which makes the approximation positive semi-definite.

    Returns:
        LowRank with `Z = Y Q` and `D = diag(d)`; nan columns for a task whose products are not finite.

    Raises:
        ValueError: `rank` < 1 or > P.

    Source: Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation" (2023); Frangella,
    Tropp and Udell, "Randomized Nystrom preconditioning" (2021).
    """
    size = like.shape[-1]
    if not 1 <= rank <= size:
        raise ValueError(f"rank must be 1 to P = {size}, got {rank}")
    omega = _directions(size, rank, seed, like.dtype).to(like.device)
    y = torch.stack([curvature(omega[:, k].expand_as(like)) for k in range(rank)], dim=-1)
    w = torch.einsum("pr,tps->trs", omega, y)
    usable = w.isfinite().flatten(1).all(-1)
    d, q = eigh(0.5 * (w + w.mT))
    magnitude = d if positive else d.abs()
    kept = magnitude > 10 * rank * torch.finfo(d.dtype).eps * d.abs().amax(-1, keepdim=True)
    columns = torch.where(kept[:, None, :], y @ q, 0.0)
    columns = torch.where(usable[:, None, None], columns, torch.nan)
    return LowRank(columns, torch.where(kept, d, 1.0))


def nystrom(system: ProximalSystem, b: Tensor, *, rank: int, seed: int = 0, rtol: float = 0.0) -> LinearSolution:
    """Solve with the Nystrom approximation in place of the curvature; no iteration, `rank` independent products.

    Args:
        system: `C + Lambda + mu I`.
        b: `[T, P]`.
        rank: 1..P; exact at P.
        seed: of the random directions.
        rtol: true relative residual below which a task counts as CONVERGED; above it MAX_ITERATIONS, an approximation.

    Returns:
        LinearSolution; `iterations` is the rank.

    Raises:
        ValueError: see `low_rank_curvature`.

    Source: Hataya and Yamada (2023): the approximation inverted by the Woodbury identity.
    """
    x = low_rank_curvature(system.curvature, b, rank=rank, seed=seed).solve(system, b)
    finite = x.isfinite().all(-1)
    x = torch.where(finite[:, None], x, 0.0)
    residual = relative_residual(system, b, x)
    outcome = torch.where(residual <= rtol, int(Outcome.CONVERGED), int(Outcome.MAX_ITERATIONS))
    outcome = torch.where(finite & residual.isfinite(), outcome, int(Outcome.NON_FINITE))
    return LinearSolution(x, outcome, torch.full_like(outcome, rank), residual)


def nystrom_preconditioner(system: ProximalSystem, like: Tensor, *, rank: int, seed: int = 0) -> Matvec:
    """`p -> (C_r + Lambda + mu I)^-1 p` with the positive part C_r of the approximation: symmetric positive definite.

    Args:
        system: `C + Lambda + mu I`; `rank` products with C are taken now, none later.
        like: `[T, P]`, for shape, type and device.
        rank: 1..P.
        seed: of the random directions.

    Returns:
        A matvec `[T, P] -> [T, P]`.

    Raises:
        ValueError: see `low_rank_curvature`.

    Source: Frangella, Tropp and Udell, "Randomized Nystrom preconditioning" (2021), section 5, with Lambda for their `mu I`.
    """
    approximation = low_rank_curvature(system.curvature, like, rank=rank, seed=seed, positive=True)
    return lambda p: approximation.solve(system, p)


@lru_cache(maxsize=4)
def _directions(size: int, rank: int, seed: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn)[0]
    return orthonormal.to(dtype)
