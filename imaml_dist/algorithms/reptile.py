"""Reptile: move theta towards where tasks end up."""

from __future__ import annotations

from dataclasses import dataclass, field

from imaml_dist.algorithms.algorithm import NothingOwned
from imaml_dist.algorithms.inner import FirstOrder, GradientDescent, refuse_tolerance
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.unrolled import reptile_meta_gradient


@dataclass(frozen=True)
class Reptile(NothingOwned):
    """Reptile: `g = theta - phi`, with phi reached by mini-batches of all of a task's samples.

    Reptile has no query set: what it learns comes from the inner products between the gradients of different mini-batches
    of one task. In meta-training the inner loop therefore cycles through the support samples and the query samples in
    batches of the support's size, and the query accuracy of the record is one of samples that were trained on.
    At meta-test it adapts to the support samples alone, as every other algorithm does.

    Attributes:
        inner: the updates.

    Raises:
        ValueError: `inner` has a tolerance; all its steps are taken.

    Source: Nichol et al. (2018), algorithm 2 and section 3.
    """

    inner: FirstOrder = field(default_factory=GradientDescent)

    def __post_init__(self) -> None:
        refuse_tolerance("Reptile", self.inner)

    @property
    def second_order(self) -> bool:
        """See `Algorithm.second_order`."""
        return False

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        return self.inner.solve(problem, None)

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        inner = descend(
            problem.support_loss,
            problem.anchor,
            self.inner.rule(),
            steps=self.inner.steps,
            batches=problem.mini_batches(),
        )
        problem.lap("inner")
        return inner, reptile_meta_gradient(problem.query_loss, inner.params, problem.anchor)
