"""Meta-gradients of the explicit methods, which differentiate the inner loop itself or ignore it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.implicit import MetaGradient, query_gradient
from imaml_dist.core.inner.problem import finite
from imaml_dist.core.inner.rule import Rule
from imaml_dist.core.inner.solution import InnerSolution, stationarity
from imaml_dist.core.outcome import TaskOutcome, all_finite, inner_outcome
from imaml_dist.core.proximal.protocol import Proximal


def first_order_meta_gradient(query_loss: Objective, adapted: Tensor) -> MetaGradient:
    """First-order MAML: `g_t = v_t = grad L_query(phi_t)`, as if `d phi / d theta` were the identity.

    Args:
        query_loss: `[T, P] -> [T]`.
        adapted: phi, `[T, P]`.

    Returns:
        MetaGradient without a linear solve.

    Source: Finn et al. (2017) section 5.2; Nichol et al. (2018).
    """
    losses, v = query_gradient(query_loss, adapted)
    return MetaGradient(gradient=v, first_order=v, query_loss=losses, solution=None)


def reptile_meta_gradient(query_loss: Objective, adapted: Tensor, anchor: Tensor) -> MetaGradient:
    """Reptile: `g_t = theta - phi_t`, the way that the inner loop went, backwards.

    It carries the inner step sizes: an outer SGD step of rate e is the paper's `theta <- theta + e (phi - theta)`, and an
    outer optimiser such as Adam, which ignores scale, takes it as it is. The paper's `(theta - phi) / alpha` is
    this divided by the inner rate. The query loss and its gradient are reported only; they do not enter g.

    Args:
        query_loss: `[T, P] -> [T]`.
        adapted: phi, `[T, P]`.
        anchor: theta, `[T, P]`.

    Returns:
        MetaGradient without a linear solve.

    Raises:
        ValueError: phi and theta differ in shape.

    Source: Nichol et al., "On first-order meta-learning algorithms" (2018), algorithms 1-2.
    """
    if adapted.shape != anchor.shape:
        raise ValueError(f"adapted {tuple(adapted.shape)} and anchor {tuple(anchor.shape)} differ in shape")
    losses, v = query_gradient(query_loss, adapted)
    return MetaGradient(gradient=anchor - adapted, first_order=v, query_loss=losses, solution=None)


def unrolled_meta_gradient(
    support_loss: Objective,
    query_loss: Objective,
    anchor: Tensor,
    rule: Rule,
    *,
    steps: int,
    proximal: Proximal | None = None,
    own: Mapping[str, Tensor] | None = None,
    adapted_entries: Tensor | None = None,
    adapted_loss: Callable[[Tensor], Objective] | None = None,
) -> tuple[InnerSolution, MetaGradient]:
    """MAML of second order: `g_t = d L_query(phi_K(theta)) / d theta` through all K steps `phi <- phi - rule(grad G(phi))`.

    The graph of every step is kept until the end, so **memory grows with `steps`**: about K times the activations of a
    forward and a differentiable backward pass. The implicit gradient needs one of these.

    A task whose numbers are not finite has rows that are not finite and an outcome that says so; other rows stay as they are.

    Args:
        support_loss: `[T, P] -> [T]`, twice differentiable.
        query_loss: `[T, P] -> [T]`; called once.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        rule: turns gradients into updates.
        steps: K >= 0.
        proximal: the regulariser; None leaves it out, as in MAML.
        own: leaf tensors that require a gradient, by name, with a row per task, of which the caller built `rule` (the
            rates of Meta-SGD) or `proximal`.
        adapted_entries: the E entries that the inner loop moves, a bool mask `[P]` or indices `[E]` (ANIL: the head); all
            when None. The rule then sees gradients `[T, E]`.
        adapted_loss: theta `[T, P]` -> the support loss as a function of the moved entries alone, `[T, E] -> [T]`, equal to
            `support_loss`. With it the inner steps do not go back through the entries that stay, and what depends on those
            alone (ANIL: the features) can be computed once for all steps.

    Returns:
        The inner solution, without a graph, and the meta-gradient without a linear solve. With `adapted_entries` the
        stationarity is that of the moved entries; the gradient has all P.

    Raises:
        ValueError: `steps` < 0, a tensor of `own` that is not a leaf requiring a gradient or has no row per task, entries
            that do not fit the anchor, or `adapted_loss` without entries.

    Source: Finn et al. (2017), eq. 1 and algorithm 1; Meta-SGD: Li et al. (2017), algorithm 1; ANIL: Raghu et al. (2020),
    section 4.
    """
    own = dict(own or {})
    _refuse_misuse(anchor, steps, own, adapted_entries, adapted_loss)
    entries = None if adapted_entries is None else _indices(adapted_entries, anchor.shape[-1])

    with torch.enable_grad():
        theta = anchor.detach().requires_grad_(True)
        loss_of_moving = None if adapted_loss is None else adapted_loss(theta)

        def select(full: Tensor) -> Tensor:
            return full if entries is None else full.index_select(1, entries)

        def whole(moving: Tensor) -> Tensor:
            return moving if entries is None else theta.index_copy(1, entries, moving)

        def loss_and_gradient(moving: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
            phi = whole(moving)
            losses = support_loss(phi) if loss_of_moving is None else loss_of_moving(moving)
            (gradient,) = torch.autograd.grad(losses.sum(), moving, create_graph=create_graph)
            if proximal is not None:
                gradient = gradient + select(proximal.apply(phi - theta))
            return losses, gradient

        moving = select(theta)
        state = rule.start(moving)
        first: tuple[Tensor, Tensor] | None = None
        for step in range(steps):
            losses, gradient = loss_and_gradient(moving, create_graph=True)
            first = first or (losses.detach(), gradient.detach())
            update, state = rule.update(gradient, state, step)
            moving = moving - update

        phi = whole(moving)
        query_losses = query_loss(phi)
        inputs = (phi, theta, *own.values())
        v, meta, *rows = torch.autograd.grad(query_losses.sum(), inputs, materialize_grads=True)
        losses, gradient = loss_and_gradient(moving.detach().requires_grad_(True), create_graph=False)

    losses, gradient, phi = losses.detach(), gradient.detach(), phi.detach()
    first = first or (losses, gradient)
    total = losses if proximal is None else losses + proximal.value(phi - anchor.detach()).detach()
    usable = finite(losses, gradient) & all_finite(phi)
    inner = InnerSolution(
        params=phi,
        loss=losses,
        stationarity=stationarity(gradient, first[1]),
        steps=torch.full_like(losses, steps, dtype=torch.int64),
        outcome=torch.where(usable, inner_outcome(first[0], total), int(TaskOutcome.NON_FINITE)),
    )
    meta_gradient = MetaGradient(
        gradient=meta,
        first_order=v,
        query_loss=query_losses.detach(),
        solution=None,
        own=dict(zip(own, rows, strict=True)),
    )
    return inner, meta_gradient


def _indices(entries: Tensor, size: int) -> Tensor:
    """Indices `[E]` of a bool mask `[P]`, or the indices themselves."""
    if entries.dtype == torch.bool and entries.shape == (size,):
        return entries.nonzero().squeeze(-1)
    whole_numbers = entries.dim() == 1 and not entries.is_floating_point() and entries.dtype != torch.bool
    ordered = entries.flatten().sort().values
    if not whole_numbers or bool((ordered.diff() == 0).any() or (ordered < 0).any() or (ordered >= size).any()):
        raise ValueError(
            f"adapted_entries must be a bool mask [{size}] or different indices below {size}, "
            f"got {entries.dtype} {tuple(entries.shape)}"
        )
    return entries.long()


def _refuse_misuse(
    anchor: Tensor,
    steps: int,
    own: Mapping[str, Tensor],
    entries: Tensor | None,
    adapted_loss: Callable[[Tensor], Objective] | None,
) -> None:
    if steps < 0:
        raise ValueError(f"need steps >= 0, got {steps}")
    if adapted_loss is not None and entries is None:
        raise ValueError("adapted_loss is the loss of adapted_entries, which are not given")
    for name, value in own.items():
        if not (value.is_leaf and value.requires_grad and value.shape[:1] == anchor.shape[:1]):
            raise ValueError(
                f"own parameter {name!r} must be a leaf that requires a gradient, with {anchor.shape[0]} rows; "
                f"got shape {tuple(value.shape)}, leaf {value.is_leaf}, requires_grad {value.requires_grad}"
            )
