"""Curvature operators of a task batch: linearised once, then multiplied with as often as a solver likes.

Both functions build the graph that a product needs exactly once; a product is one backward pass through it (the
Hessian) or one tangent and one backward pass (Gauss-Newton). Because task t's loss depends on row t of the
parameters only, the derivative of the *sum* of the losses holds every task's own derivative in its own row, and one
pass serves all tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Parameters `[T, P]` -> losses `[T]`, the mean over each task's samples; loss t depends on row t only."""

Matvec = Callable[[Tensor], Tensor]
"""Linear, symmetric, block-diagonal over tasks: `[T, P]` -> `[T, P]`."""


def hessian_operator(objective: Objective, at: Tensor) -> Matvec:
    """Products with each task's Hessian, `v_t -> H_t v_t` with `H_t = d^2 L_t / d phi_t^2`, by reverse over reverse.

    Cost: one forward and one differentiable backward pass now; one backward pass through both for each product. The
    graph lives as long as the returned function.

    Args:
        objective: twice differentiable.
        at: `[T, P]`, the point phi; not modified.

    Returns:
        A matvec over `[T, P]`.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994); iMAML section 3.2.
    """
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(point).sum(), point, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear in the parameters
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(gradient, point, grad_outputs=v, retain_graph=True, materialize_grads=True)
        return hv

    return product


def gauss_newton_operator(predict: Callable[[Tensor], Tensor], loss: Objective, at: Tensor) -> Matvec:
    """Products with each task's generalised Gauss-Newton matrix, `v_t -> J_t' S_t J_t v_t`.

    `J = d predict / d phi` and `S = d^2 loss / d output^2`. With a loss that is convex in the outputs (cross entropy,
    squared error) the matrix is positive semi-definite, also where the Hessian is not. It equals the Hessian without
    the term that carries the curvature of the network itself: *an approximation of the Hessian*, exact when `predict`
    is linear or the loss gradient at the outputs vanishes.

    `J v` comes from differentiating `w -> J'w`, which is linear in `w`, so only reverse mode is needed. Cost: a
    forward and a differentiable backward pass now; about a forward (tangent) and a backward pass for each product.

    Args:
        predict: parameters `[T, P]` -> outputs `[T, ...]`; row t of the outputs depends on row t only.
        loss: outputs `[T, ...]` -> losses `[T]`, twice differentiable.
        at: `[T, P]`, the point phi; not modified.

    Returns:
        A matvec over `[T, P]`.

    Source: Schraudolph, "Fast curvature matrix-vector products" (2002); Martens (2010).
    """
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        outputs = predict(point)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, point, cotangent, create_graph=True, materialize_grads=True)
    output_hessian = hessian_operator(loss, outputs)

    def product(v: Tensor) -> Tensor:
        (tangent,) = torch.autograd.grad(pullback, cotangent, v, retain_graph=True, materialize_grads=True)
        (product,) = torch.autograd.grad(
            outputs, point, output_hessian(tangent), retain_graph=True, materialize_grads=True
        )
        return product

    return product
