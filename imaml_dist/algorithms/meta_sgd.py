"""Meta-SGD: learn a step size for every parameter together with the initialisation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml_dist.algorithms.inner import GradientDescent, refuse_tolerance
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.gradient_descent import GradientDescentRule
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.unrolled import unrolled_meta_gradient
from imaml_dist.core.vector import ParameterLayout

RATES = "rates"


@dataclass(frozen=True)
class MetaSGD:
    """`phi <- phi - alpha * grad L(phi)` with alpha `[P]` learned through the unrolled loop.

    alpha has no constraint, as in the paper: it may turn negative, and then decides the direction too.

    Attributes:
        inner: alpha's initial value and the number of steps (one in the paper).
        lr: outer learning rate of alpha; None is the model's.

    Raises:
        ValueError: `inner` has a tolerance; all its steps are taken.

    Source: Li et al. (2017), algorithm 1.
    """

    inner: GradientDescent = field(default_factory=lambda: GradientDescent(lr=0.1, steps=1))
    lr: float | None = None

    def __post_init__(self) -> None:
        refuse_tolerance("MetaSGD", self.inner)

    @property
    def second_order(self) -> bool:
        """See `Algorithm.second_order`."""
        return True

    @property
    def own_lr(self) -> float | None:
        """See `Algorithm.own_lr`."""
        return self.lr

    def own_parameters(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Algorithm.own_parameters`."""
        return {RATES: torch.full((layout.size,), self.inner.lr, dtype=dtype)}

    def describe(self, own: dict[str, Tensor], layout: ParameterLayout) -> dict[str, Tensor]:
        """See `Algorithm.describe`."""
        return {RATES: own[RATES]}

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        return descend(
            problem.support_loss,
            problem.anchor,
            GradientDescentRule(problem.own[RATES]),
            steps=self.inner.steps,
        )

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        rates = problem.own[RATES].detach().expand_as(problem.anchor).clone().requires_grad_(True)
        return unrolled_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            problem.anchor,
            GradientDescentRule(rates),
            steps=self.inner.steps,
            own={RATES: rates},
        )
