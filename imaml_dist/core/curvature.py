"""Curvature operators of a task batch: linearised once, then multiplied with as often as a solver likes.

Both functions build the graph that a product needs exactly once; a product is one backward pass through it (the
Hessian) or one tangent and one backward pass (Gauss-Newton). Because task t's loss depends on row t of the
parameters only, the derivative of the *sum* of the losses holds every task's own derivative in its own row, and one
pass serves all tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.eigen import eigh

Objective = Callable[[Tensor], Tensor]
"""Parameters `[T, P]` -> losses `[T]`, the mean over each task's samples; loss t depends on row t only."""

Matvec = Callable[[Tensor], Tensor]
"""Linear, symmetric, block-diagonal over tasks: `[T, P]` -> `[T, P]`."""


@dataclass(frozen=True)
class Linearised:
    """An objective at one point, all from one forward and one differentiable backward pass.

    Attributes:
        losses: `[T]`, detached.
        gradient: `[T, P]`, detached.
        curvature: products with the objective's curvature there; the graph lives as long as it does.
    """

    losses: Tensor
    gradient: Tensor
    curvature: Matvec


Linearise = Callable[[Tensor], Linearised]
"""A point `[T, P]` -> an objective there with its curvature."""


def linearise_hessian(objective: Objective, at: Tensor) -> Linearised:
    """Loss, gradient and Hessian of an objective at a point; see `hessian_operator`."""
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        losses = objective(point)
        (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear in the parameters
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(gradient, point, grad_outputs=v, retain_graph=True, materialize_grads=True)
        return hv

    return Linearised(losses.detach(), gradient.detach(), product)


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
    return linearise_hessian(objective, at).curvature


MAX_BYTES = 4 << 30
"""Of the factors of all tasks of a call."""

COUPLED = 64.0
"""Rounding units of a task's largest product that may appear at samples which it left out, before samples count as coupled."""


class GaussNewton:
    """Each task's generalised Gauss-Newton matrix `J'S J`, as products and as factors.

    `J = d predict / d phi` and `S = d^2 loss / d output^2`. With a loss that is convex in the outputs (cross entropy,
    squared error) the matrix is positive semi-definite, also where the Hessian is not. It equals the Hessian without
    the term that carries the curvature of the network itself: *an approximation of the Hessian*, exact when `predict`
    is linear or the loss gradient at the outputs vanishes.

    `J v` comes from differentiating `w -> J'w`, which is linear in `w`, so only reverse mode is needed. Cost: a
    forward and a differentiable backward pass at the first product; about a forward (tangent) and a backward pass for each.

    Args:
        predict: parameters `[T, P]` -> outputs `[T, n, ...]`; row t of the outputs depends on row t only.
        loss: outputs `[T, n, ...]` -> losses `[T]`, twice differentiable.
        at: `[T, P]`, the point phi; not modified.
        predict_each: parameters `[T n, P]` -> outputs `[T n, ...]`, each sample under parameters of its own, task by task, if
            samples do not depend on each other: one backward pass then gives a row of the Jacobian for every sample.

    Source: Schraudolph, "Fast curvature matrix-vector products" (2002); Martens (2010).
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        loss: Objective,
        at: Tensor,
        predict_each: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._predict, self._loss, self._at, self._predict_each = predict, loss, at.detach(), predict_each
        self._linearised: Linearised | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """`J'S J v`: `[T, P] -> [T, P]`."""
        if self._linearised is None:
            self._linearised = self._linearise()
        return self._linearised.curvature(v)

    def linearised(self) -> Linearised:
        """Itself with loss and gradient, which come along: the gradient is `J'w`, `w` being the loss's gradient at the outputs."""
        if self._linearised is None:
            self._linearised = self._linearise()
        return Linearised(self._linearised.losses, self._linearised.gradient, self)

    def factors(self, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
        """`(F [T, r, P], d [T, r])` with `J'S J = F' diag(d) F`, where `S = V diag(d) V'` and `F = V'J`.

        Eigenvalues of S that are zero in rounding for all tasks are left out: for cross entropy one per sample, since a
        constant added to all logits changes nothing, so `r = n (N - 1)`. Cost: `N - 1` backward passes through n copies of
        the parameters a task where samples are independent, else r backward passes; `N + log2 n` products with S where the loss is
        a sum over samples, else n N more. nan where outputs are not finite.

        Raises:
            torch.OutOfMemoryError: F would be larger than `max_bytes`; fewer tasks in a call may do.
        """
        with torch.no_grad():
            outputs = self._predict(self._at)
        tasks, n = outputs.shape[:2]
        size = outputs[0].numel()
        curvature = hessian_operator(self._loss, outputs)
        blocks = _sample_blocks(curvature, outputs)
        if blocks is None:
            d, v = _spectrum(_matrix(curvature, outputs), tasks)
        else:
            d, v = _spectrum(blocks.flatten(0, 1), tasks)
            d = d.reshape(tasks, -1)
        rank = d.shape[1]
        if tasks * rank * self._at.shape[1] * self._at.element_size() > max_bytes:
            raise torch.OutOfMemoryError(
                f"the Jacobian of {tasks} tasks with {size} outputs and {self._at.shape[1]} parameters is larger than "
                f"{max_bytes / 2**30:.1f} GiB; use an iterative solver, or fewer tasks in a call"
            )
        if blocks is not None and self._predict_each is not None:
            each_own = self._at.unsqueeze(1).expand(-1, n, -1).flatten(0, 1)  # for a single task no copies
            rows = _rows(self._predict_each, each_own, v)
        else:
            rows = _rows(self._predict, self._at, v if blocks is None else _apart(v.reshape(tasks, n, *v.shape[1:])))
        return rows.reshape(tasks, rank, -1), d

    def _linearise(self) -> Linearised:
        with torch.enable_grad():
            point = self._at.clone().requires_grad_(True)
            outputs = self._predict(point)
        loss = linearise_hessian(self._loss, outputs)
        with torch.enable_grad():
            cotangent = loss.gradient.requires_grad_(True)
            (pullback,) = torch.autograd.grad(outputs, point, cotangent, create_graph=True, materialize_grads=True)

        def product(v: Tensor) -> Tensor:
            (tangent,) = torch.autograd.grad(pullback, cotangent, v, retain_graph=True, materialize_grads=True)
            (result,) = torch.autograd.grad(
                outputs, point, loss.curvature(tangent), retain_graph=True, materialize_grads=True
            )
            return result

        return Linearised(loss.losses, pullback.detach(), product)


def _rows(predict: Callable[[Tensor], Tensor], at: Tensor, v: Tensor) -> Tensor:
    """`V'J`: for every column of `v` `[B, m, r]` the gradient of outputs `[B, m]` along it, `[B, r, P]`."""
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        outputs = predict(point).flatten(1)
    rows = at.new_empty(at.shape[0], v.shape[-1], at.shape[1])
    for k in range(v.shape[-1]):  # each to its place at once: all of them beside their stack would be twice the memory
        (rows[:, k],) = torch.autograd.grad(outputs, point, v[..., k], retain_graph=True, materialize_grads=True)
    return rows


def _spectrum(s: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[B, r]` and eigenvectors `[B, m, r]` of `[B, m, m]`, B / tasks of them a task; nan where s is not finite.

    Without those that are zero for all, in the rounding of their task's largest: a block of cancellation has none of its own.
    """
    d, v = eigh(s)
    size = d.abs().reshape(tasks, -1).amax(-1).repeat_interleave(len(d) // tasks).unsqueeze(-1)
    kept = (d.abs() > size * s.shape[-1] * torch.finfo(s.dtype).eps).any(0)
    kept[-1] = True  # where all is zero there is still one row
    return d[:, kept], v[..., kept]


def _apart(v: Tensor) -> Tensor:
    """Block-diagonal matrices `[T, n c, n r]` of blocks `[T, n, c, r]`."""
    tasks, n, c, r = v.shape
    identity = torch.eye(n, dtype=v.dtype, device=v.device)
    return (v[:, :, :, None, :] * identity[:, None, :, None]).reshape(tasks, n * c, n * r)


def _matrix(curvature: Matvec, outputs: Tensor) -> Tensor:
    """S `[T, m, m]`, a product for each of the m outputs of a task."""
    m = outputs[0].numel()
    identity = torch.eye(m, dtype=outputs.dtype, device=outputs.device).reshape(m, 1, *outputs.shape[1:])
    return torch.stack([curvature(row.expand_as(outputs)).flatten(1) for row in identity], dim=-1)


def _sample_blocks(curvature: Matvec, outputs: Tensor) -> Tensor | None:
    """S `[T, n, c, c]` of a loss that is a sum over samples, a product for each of a sample's c outputs; None if samples are coupled.

    `log2 n` products more tell. Each is with a random vector at the samples whose number has a certain bit and with zero at the others,
    where it must be zero: any two samples differ in a bit. A comparison of numbers that are not zero would have to know how a
    loss rounds, and a sample that is sure of its class has a block of nothing but cancellation.
    Tasks whose numbers are not finite are not asked, for a broken one must not change how the others are computed.
    """
    tasks, n, c = outputs.shape[0], outputs.shape[1], outputs[0, 0].numel()
    identity = torch.eye(c, dtype=outputs.dtype, device=outputs.device).reshape(c, 1, 1, *outputs.shape[2:])
    columns = [curvature(row.expand_as(outputs)).reshape(tasks, n, c) for row in identity]
    blocks = torch.stack(columns, dim=-1)
    probe = torch.randn(n, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(outputs)
    finite = blocks.isfinite().flatten(1).all(-1)
    numbers = torch.arange(n, device=outputs.device)
    for bit in range((n - 1).bit_length()):
        within = (numbers >> bit) % 2 == 1
        part = torch.where(within[:, None], probe, 0.0)
        seen = curvature(part.reshape(1, *outputs.shape[1:]).expand_as(outputs)).reshape(tasks, n, c).abs()
        rounding = COUPLED * torch.finfo(outputs.dtype).eps * seen.amax((1, 2))
        alone = (seen[:, ~within].amax((1, 2)) <= rounding) | ~finite
        if not bool(alone.all()):
            return None
    return blocks


def gauss_newton_operator(
    predict: Callable[[Tensor], Tensor],
    loss: Objective,
    at: Tensor,
    predict_each: Callable[[Tensor], Tensor] | None = None,
) -> GaussNewton:
    """Products with each task's Gauss-Newton matrix; see `GaussNewton` for the arguments."""
    return GaussNewton(predict, loss, at, predict_each)
