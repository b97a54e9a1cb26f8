"""First-order MAML: the query gradient at phi stands for the meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from imaml_dist.algorithms.algorithm import NothingOwned
from imaml_dist.algorithms.inner import GradientDescent, InnerSolver, NewtonCG
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.unrolled import first_order_meta_gradient


@dataclass(frozen=True)
class FOMAML(NothingOwned):
    """First-order MAML: no proximal term, `g = grad L_query(phi)`.

    Attributes:
        inner: how phi is found.

    Source: Finn et al. (2017), section 5.2.
    """

    inner: InnerSolver = field(default_factory=GradientDescent)

    @property
    def second_order(self) -> bool:
        """See `Algorithm.second_order`: only if the inner solver is."""
        return isinstance(self.inner, NewtonCG)

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        return self.inner.solve(problem, None)

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        inner = self.adapt(problem)
        problem.lap("inner")
        return inner, first_order_meta_gradient(problem.query_loss, inner.params)
