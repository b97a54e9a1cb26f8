"""Tasks in which a part of the parameters adapts: an inner problem of its own, and the way back to the gradient of all.

With theta = (w0, b), where w adapts and b is shared, the inner problem is `w* = argmin L_support(w, b) + 1/2 (w - w0)' Lambda (w - w0)`.
The implicit function theorem gives, with `u = (H_ww + Lambda)^-1 v_w` and v the query gradient,

    g_w = Lambda u,   g_b = v_b - H_bw u.

That is the limit of iMAML's gradient for all parameters where the strength of b goes to infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.core.curvature import hessian_operator
from imaml_dist.core.implicit import MetaGradient, query_gradient
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.head import find_head
from imaml_dist.models.part import HeadAlone, Restricted, names_under, places_of, sublayout


@dataclass(frozen=True)
class Features:
    """What the head is given, as functions of theta.

    Attributes:
        theta: `[T, P]`, a leaf.
        support, query: `[T, n, ...]`, with their graphs.
    """

    theta: Tensor
    support: Tensor
    query: Tensor

    def pull_back(self, which: Tensor, cotangent: Tensor) -> Tensor:
        """Gradient with respect to theta `[T, P]` of one of them along a cotangent; zero where it does not depend on theta."""
        if not which.requires_grad:
            return torch.zeros_like(self.theta)
        (found,) = torch.autograd.grad(which, self.theta, cotangent, materialize_grads=True)
        return found


@dataclass(frozen=True)
class Part:
    """What adapts in T tasks.

    Where the head is the model's last module and what adapts is all of it (`models.head`), features are computed and differentiated once
    for all inner and linear steps; elsewhere every one of these evaluates the whole model, with the same result.

    Attributes:
        whole: the tasks as functions of all parameters, `[T, P]`.
        problem: the tasks as functions of those that adapt, `[T, E]`.
        places: of these in the whole vector, `[E]`.
        features: None where the head cannot be cut off.
    """

    whole: TaskProblem
    problem: TaskProblem
    places: Tensor
    features: Features | None

    @staticmethod
    def of(whole: TaskProblem, adapts: Sequence[str], *, query: bool = True) -> Part:
        """The part of the parameters with these names or dotted beginnings of names.

        Args:
            whole: the tasks.
            adapts: names.
            query: whether the query samples count, and a gradient will be asked for.

        Raises:
            ValueError: see `names_under`.
        """
        functional, support = whole.functional, whole.support
        assert isinstance(functional, FunctionalModel)
        names = names_under(functional.layout, adapts, "adapts")
        places = places_of(functional.layout, names, whole.anchor.device)
        if names == functional.layout.names:
            return Part(whole, whole, places, None)
        anchor, layout = whole.anchor[:, places], sublayout(functional.layout, names)
        head = find_head(functional, names, support.x, support.key)
        if head is None or head.names != names:
            restricted = Restricted(functional, whole.anchor, places, layout)
            return Part(whole, replace(whole, functional=restricted, anchor=anchor), places, None)
        with torch.set_grad_enabled(query):
            theta = whole.anchor.detach().clone().requires_grad_(query)
            on_support = head.features(theta, support.x, support.key)
            on_query = head.features(theta, whole.query.x, whole.query.key) if query else on_support
        problem = replace(
            whole,
            functional=HeadAlone(head),
            anchor=anchor,
            support=Samples(on_support.detach(), support.y),
            query=Samples(on_query.detach(), whole.query.y if query else support.y),
        )
        return Part(whole, problem, places, Features(theta, on_support, on_query))

    def all(self, adapted: Tensor) -> Tensor:
        """theta `[T, P]` with `adapted` `[T, E]` in its places."""
        return self.whole.anchor.index_copy(-1, self.places, adapted)

    def meta_gradient(self, inner: InnerSolution, meta: MetaGradient) -> MetaGradient:
        """The meta-gradient of all parameters from that of those that adapt.

        H_bw is the Hessian's block, whatever matrix the system was solved with: it is multiplied with once and inverted never.

        Args:
            inner: the solved inner problem.
            meta: its implicit gradient, with the linear solve.
        """
        assert meta.solution is not None
        u = meta.solution.value
        if meta.solution.unsolved is not None:  # they keep the first-order direction
            u = torch.where(meta.solution.unsolved[:, None], 0.0, u)
        if self.features is None:
            phi = self.all(inner.params)
            first_order = query_gradient(self.whole.query_loss, phi)[1]
            direction = torch.zeros_like(phi).index_copy(-1, self.places, u)
            shared = first_order - hessian_operator(self.whole.support_loss, phi)(direction)
        else:
            first_order, shared = self._through_features(self.features, inner.params, u)
            first_order = first_order.index_copy(-1, self.places, meta.first_order)
        return replace(meta, gradient=shared.index_copy(-1, self.places, meta.gradient), first_order=first_order)

    def _through_features(self, features: Features, adapted: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """`(v, v - H_bw u)` where b lies, from the Hessian of the head's loss in its parameters w and its features z."""
        predict, loss, given, entries = self.problem.functional.predict, self.whole.loss, features.support, u.shape[1]

        def support_loss(both: Tensor) -> Tensor:
            w, z = both[:, :entries], both[:, entries:].reshape(given.shape)
            return loss(predict(w, z), self.whole.support.y)

        both = torch.cat([adapted, given.detach().flatten(1)], dim=1)
        direction = torch.cat([u, torch.zeros_like(both[:, entries:])], dim=1)
        pulled = hessian_operator(support_loss, both)(direction)[:, entries:].reshape(given.shape)
        _, pushed = query_gradient(lambda z: loss(predict(adapted, z), self.whole.query.y), features.query)
        v = features.pull_back(features.query, pushed)
        return v, v - features.pull_back(given, pulled)
