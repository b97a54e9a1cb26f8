"""MAML: the meta-gradient through the unrolled inner loop, of second order."""

from __future__ import annotations

from dataclasses import dataclass, field

from imaml_dist.algorithms.algorithm import NothingOwned
from imaml_dist.algorithms.inner import FirstOrder, GradientDescent, refuse_tolerance
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.unrolled import unrolled_meta_gradient


@dataclass(frozen=True)
class MAML(NothingOwned):
    """Model-agnostic meta-learning. Memory grows with the number of inner steps.

    Attributes:
        inner: the updates that are unrolled.
        lam: strength of a proximal term in the inner loop; None, as in the paper, is without one.

    Raises:
        ValueError: `inner` has a tolerance; all its steps are taken.

    Source: Finn et al. (2017), algorithm 2.
    """

    inner: FirstOrder = field(default_factory=lambda: GradientDescent(lr=0.1, steps=5))
    lam: float | None = None

    def __post_init__(self) -> None:
        refuse_tolerance("MAML", self.inner)

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        return self.inner.solve(problem, self._proximal)

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        return unrolled_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            problem.anchor,
            self.inner.rule(),
            steps=self.inner.steps,
            proximal=self._proximal,
        )

    @property
    def _proximal(self) -> ScalarProximal | None:
        return None if self.lam is None else ScalarProximal(self.lam)
