"""ANIL: almost no inner loop; only the head adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imaml_dist.algorithms.algorithm import NothingOwned
from imaml_dist.algorithms.inner import FirstOrder, GradientDescent, refuse_tolerance
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.curvature import Objective
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.unrolled import unrolled_meta_gradient
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.head import find_head
from imaml_dist.models.part import names_under, places_of


@dataclass(frozen=True)
class ANIL(NothingOwned):
    """MAML whose inner loop moves the head alone; the body learns features by the outer loop.

    Where the head is the model's last module (`models.head`), features are computed and differentiated once for all inner
    steps; elsewhere every step evaluates the whole model, with the same result.

    Attributes:
        inner: the updates that are unrolled.
        head: names, or dotted beginnings of names, of the parameters that adapt; empty is the module of the last parameter.

    Raises:
        ValueError: `inner` has a tolerance; all its steps are taken.

    Source: Raghu et al. (2020), section 4.
    """

    inner: FirstOrder = field(default_factory=lambda: GradientDescent(lr=0.1, steps=5))
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_tolerance("ANIL", self.inner)

    def own_parameters(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """None; a wrong name is refused here, before anything is computed. Raises what `names` raises."""
        self.names(layout)
        return {}

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        moving = self.moving(problem.functional.layout, problem.anchor.device)

        def whole(head: Tensor) -> Tensor:
            return problem.anchor.index_copy(-1, moving, head)

        head_loss = self._head_loss(problem)
        solution = descend(
            (lambda head: problem.support_loss(whole(head))) if head_loss is None else head_loss(problem.anchor),
            problem.anchor[:, moving],
            self.inner.rule(),
            steps=self.inner.steps,
        )
        return replace(solution, params=whole(solution.params))

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        return unrolled_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            problem.anchor,
            self.inner.rule(),
            steps=self.inner.steps,
            adapted_entries=self.moving(problem.functional.layout, problem.anchor.device),
            adapted_loss=self._head_loss(problem),
        )

    def _head_loss(self, problem: TaskProblem) -> Callable[[Tensor], Objective] | None:
        """theta -> the support loss as a function of the moving parameters; None where the head cannot be cut off."""
        support = problem.support
        assert isinstance(problem.functional, FunctionalModel)
        head = find_head(problem.functional, self.names(problem.functional.layout), support.x, support.key)
        if head is None:
            return None

        def at(theta: Tensor) -> Objective:
            features = head.features(theta, support.x, support.key)
            return lambda moving: problem.loss(head.outputs(moving, theta, features), support.y)

        return at

    def moving(self, layout: ParameterLayout, device: torch.device) -> Tensor:
        """Places of the head's entries in the flat vector, ascending. Raises what `names` raises."""
        return places_of(layout, self.names(layout), device)

    def names(self, layout: ParameterLayout) -> tuple[str, ...]:
        """The parameters that adapt, in the order of the layout.

        Raises:
            ValueError: a name of `head` is no parameter and begins none.
        """
        return names_under(layout, self.head or (layout.names[-1].rpartition(".")[0],), "head")
