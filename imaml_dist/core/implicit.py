"""The implicit meta-gradient: differentiate the *solution* of the inner problem, not the path to it.

At the minimiser phi of `G(phi, theta) = L_support(phi) + 1/2 (phi - theta)' Lambda (phi - theta)` the implicit
function theorem gives `d phi / d theta = (H + Lambda)^-1 Lambda`, with H the Hessian of the support loss at phi. The
meta-gradient of a task is therefore

    g = Lambda u,   (H + Lambda) u = v,   v = grad L_query(phi),

the symmetric form of the paper's `(I + H / lambda)^-1 v` (eq. 5-7).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec, Objective, hessian_operator
from imaml_dist.core.linear.solution import LinearSolution, relative_residual
from imaml_dist.core.linear.system import ProximalSystem, Solve
from imaml_dist.core.proximal.protocol import Proximal


@dataclass(frozen=True)
class MetaGradient:
    """Per-task meta-gradients and what they were made of.

    Attributes:
        gradient: `[T, P]`, g.
        first_order: `[T, P]`, v, the query gradient at phi; equal to g in first-order methods.
        query_loss: `[T]`.
        solution: the linear solve behind g, whose `value` is u; None in methods without one.
        own: gradients of the query loss with respect to parameters that the algorithm itself learns, by name, a row per
            task; empty where it learns none.
    """

    gradient: Tensor
    first_order: Tensor
    query_loss: Tensor
    solution: LinearSolution | None
    own: dict[str, Tensor] = field(default_factory=dict)


def query_gradient(query_loss: Objective, adapted: Tensor) -> tuple[Tensor, Tensor]:
    """`(L(phi), v = grad L(phi))` of an objective, from one forward and one backward pass.

    Args:
        query_loss: `[T, P] -> [T]`.
        adapted: phi, `[T, P]`; not modified.

    Returns:
        Losses `[T]` and gradients `[T, P]`, detached.
    """
    with torch.enable_grad():
        phi = adapted.detach().requires_grad_(True)
        losses = query_loss(phi)
        (v,) = torch.autograd.grad(losses.sum(), phi)
    return losses.detach(), v


def implicit_meta_gradient(
    support_loss: Objective,
    query_loss: Objective,
    adapted: Tensor,
    anchor: Tensor,
    *,
    proximal: Proximal,
    solve: Solve,
    curvature: Matvec | None = None,
    damping: float = 0.0,
) -> MetaGradient:
    """Implicit meta-gradients `g_t = Lambda u_t`, `(H_t + Lambda + mu I) u_t = v_t`, for T tasks at once.

    With the Hessian and without damping it is exact up to the solver's residual when phi is the minimiser of the inner
    problem; away from it the error is bounded by theorem 1 of the paper, so watch the inner solve's stationarity. The
    gradient with respect to Lambda's own parameters, `proximal.gradient(u, adapted - anchor)`, comes from the same solve.

    Where the solver got no step at all, as with negative curvature in the first one (`LinearSolution.unsolved`), no system has
    been solved: the task gets the first-order direction, `u = Lambda^-1 v` and `g = v`. Its residual is that of this u, and
    often above 1. That takes one more product of the system where there is such a task; on a GPU, which is not asked whether
    there is, with every solver that can end so.

    Args:
        support_loss: `[T, P] -> [T]`; its Hessian is the curvature unless `curvature` is given.
        query_loss: `[T, P] -> [T]`.
        adapted: phi, `[T, P]`.
        anchor: theta, `[T, P]`; must not depend on phi.
        proximal: Lambda.
        solve: linear solver of a `ProximalSystem`, for example `functools.partial(conjugate_gradient, max_iterations=5)`.
        curvature: products with another curvature of the support loss at phi (Gauss-Newton).
        damping: mu >= 0, added for stability to the system only: `g` stays `Lambda u`. As mu grows, g turns towards v.

    Returns:
        MetaGradient, rows in task order.

    Raises:
        ValueError: `damping` < 0, or phi and theta differ in shape.

    Source: iMAML eq. 5-7, lemma 1, algorithm 2.
    """
    if adapted.shape != anchor.shape:
        raise ValueError(f"adapted {tuple(adapted.shape)} and anchor {tuple(anchor.shape)} differ in shape")
    losses, v = query_gradient(query_loss, adapted)
    hessian = hessian_operator(support_loss, adapted) if curvature is None else curvature
    system = ProximalSystem(hessian, proximal, damping)
    solution = solve(system, v)
    gradient, unsolved = proximal.apply(solution.value), solution.unsolved
    if unsolved is not None and (v.device.type != "cpu" or bool(unsolved.any())):
        gradient = torch.where(unsolved[:, None], v, gradient)
        solution = _first_order_where(unsolved, system, v, solution)
    return MetaGradient(
        gradient=gradient,
        first_order=v,
        query_loss=losses,
        solution=solution,
        own=proximal.gradient(solution.value, adapted - anchor),
    )


def _first_order_where(unsolved: Tensor, system: ProximalSystem, v: Tensor, solution: LinearSolution) -> LinearSolution:
    """`solution` with `u = Lambda^-1 v` and its true residual in the tasks `unsolved`, the others as they are."""
    u = torch.where(unsolved[:, None], system.proximal.solve(v), solution.value)
    residual = torch.where(unsolved, relative_residual(system, v, u), solution.residual)
    return replace(solution, value=u, residual=residual)
