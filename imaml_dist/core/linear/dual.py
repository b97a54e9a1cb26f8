"""The exact Gauss-Newton solve in the space of the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import GaussNewton
from imaml_dist.core.linear.solution import LinearSolution, Outcome, relative_size
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.scalar import ScalarProximal


def dual_gauss_newton(system: ProximalSystem, b: Tensor) -> LinearSolution:
    """`(J'S J + B) u = b` with `B = Lambda + mu I`, solved exactly through a system of the size of the outputs.

    With `J'S J = F' D F` (`GaussNewton.factors`) and the Woodbury identity, `u = B^-1 b - B^-1 F' (I + D K)^-1 D F B^-1 b` with
    `K = F B^-1 F'` `[r, r]`. D may be singular or negative. For cross entropy r is at most `N K (N - 1)` at N-way K-shot.
    No iteration, and no graph of second order.

    Args:
        system: its curvature must be a Gauss-Newton operator.
        b: `[T, P]`.

    Returns:
        LinearSolution with `iterations` r and the true residual, from the factors. There is no tolerance: CONVERGED says that
        the elimination went through, `residual` how well.

    Raises:
        ValueError: the curvature is not a Gauss-Newton operator.
        torch.OutOfMemoryError: its Jacobian is too large for one call.

    Source: Woodbury, "Inverting modified matrices" (1950); the Gauss-Newton matrix through its outputs: Schraudolph (2002).
    """
    if not isinstance(system.curvature, GaussNewton):
        raise ValueError(
            f"the dual solve needs a Gauss-Newton operator, got {type(system.curvature).__name__}; use operator gauss_newton"
        )
    factors, d = system.curvature.factors()
    start = system.regulariser_solve(b)
    identity = torch.eye(d.shape[-1], dtype=b.dtype, device=b.device)
    if isinstance(system.proximal, ScalarProximal):  # one product, of a matrix with itself, and no second matrix
        gram = system.regulariser_solve(factors @ factors.mT)
    else:
        gram = factors @ system.regulariser_solve(factors).mT
    inner = identity + d.unsqueeze(-1) * gram
    right = d * _along(factors, start)
    usable = inner.isfinite().flatten(1).all(-1) & right.isfinite().all(-1)
    inner, right = torch.where(usable[:, None, None], inner, identity), torch.where(usable[:, None], right, 0.0)
    coefficients, _ = torch.linalg.solve_ex(inner, right)
    u = start - system.regulariser_solve(_combined(factors, coefficients))
    solved = usable & u.isfinite().all(-1)
    u = torch.where(solved[:, None], u, 0.0)

    curved = _combined(factors, d * _along(factors, u))
    residual = relative_size(b - curved - system.proximal.apply(u) - system.damping * u, b)
    outcome = torch.where(solved, int(Outcome.CONVERGED), int(Outcome.NON_FINITE))
    return LinearSolution(u, outcome, torch.full_like(outcome, d.shape[-1]), residual)


def _along(factors: Tensor, v: Tensor) -> Tensor:
    """`F v` `[T, r]`, the vector on the left: with it on the right, CPUs multiply batches several times slower."""
    return torch.bmm(v.unsqueeze(1), factors.mT).squeeze(1)


def _combined(factors: Tensor, c: Tensor) -> Tensor:
    """`F' c` `[T, P]`."""
    return torch.bmm(c.unsqueeze(1), factors).squeeze(1)
