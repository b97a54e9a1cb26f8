"""Implicit MAML: a proximal inner problem, and the gradient through its solution by one linear solve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imaml_dist.algorithms.inner import GradientDescent, InnerSolver
from imaml_dist.algorithms.linear import ConjugateGradient, Dual, LinearSolver
from imaml_dist.algorithms.part import Part
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.algorithms.strength import ProximalStrength
from imaml_dist.core.curvature import Matvec
from imaml_dist.core.implicit import MetaGradient, implicit_meta_gradient
from imaml_dist.core.inner.pull_back import pull_back
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.linear.solution import LinearSolution, Outcome
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.protocol import Proximal
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.part import names_under, sublayout

LAM = "lam."
"""What the names of Lambda's learned parameters begin with."""


@dataclass(frozen=True)
class IMAML:
    """Implicit MAML.

    Attributes:
        lam: proximal strength lambda > 0, or a `ProximalStrength` for other shapes of Lambda and for a learned one.
        inner: how phi is found.
        solver: how `(curvature + Lambda) u = v` is solved.
        reference_inner: leave the proximal term out of the inner solver and take one step `phi <- phi - lr lam (phi - theta)`
            after it; at meta-test not even that. It is what the paper's public code does, not what the paper says.
        lam_offset: added to a scalar lambda in the linear system alone (10 in the paper's public code).
        adapts: names, or dotted beginnings of names, of the parameters that adapt to a task; empty: all do. The others are shared by
            all tasks, as if their strength were infinite, and are meta-trained by the same implicit gradient (`algorithms.part`).

    Raises:
        ValueError: `lam` is not positive, or the reference's deviations are asked of a Lambda or inner solver they do not have.

    Source: Rajeswaran et al. (2019), algorithms 1 and 2.
    """

    lam: float | ProximalStrength = 0.1
    inner: InnerSolver = field(default_factory=GradientDescent)
    solver: LinearSolver = field(default_factory=ConjugateGradient)
    reference_inner: bool = False
    lam_offset: float = 0.0
    adapts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.lam, ProximalStrength):
            ScalarProximal(self.lam)
        plain = self.strength.kind == "scalar" and not self.strength.learn
        if (self.reference_inner or self.lam_offset) and not (plain and isinstance(self.inner, GradientDescent)):
            raise ValueError(
                "reference_inner and lam_offset are for a fixed scalar lam and gradient descent; leave them out otherwise"
            )

    @property
    def strength(self) -> ProximalStrength:
        """Lambda's record, also where `lam` is a number."""
        return self.lam if isinstance(self.lam, ProximalStrength) else ProximalStrength(init=self.lam)

    @property
    def second_order(self) -> bool:
        """See `Algorithm.second_order`."""
        return True

    @property
    def own_lr(self) -> float | None:
        """See `Algorithm.own_lr`."""
        return self.strength.lr

    def own_parameters(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Algorithm.own_parameters`: Lambda's unconstrained parameters if it is learned.

        Raises:
            ValueError: Lambda does not fit the parameters, or a name of `adapts` is none.
        """
        layout = self.adapting(layout)
        raw = self.strength.initial(layout, dtype) if self.strength.kind != "scalar" or self.strength.learn else {}
        return {LAM + name: value for name, value in raw.items()} if self.strength.learn else {}

    def describe(self, own: dict[str, Tensor], layout: ParameterLayout) -> dict[str, Tensor]:
        """See `Algorithm.describe`: Lambda's diagonal."""
        raw = _raw(own)
        return {"lam": self.strength.parametrisation(self.adapting(layout)).build(raw).diagonal()} if raw else {}

    def proximal(self, problem: TaskProblem) -> Proximal:
        """Lambda as it is now, of the parameters that adapt (`part`)."""
        return self.strength.build(problem.functional.layout, _raw(problem.own), problem.anchor)

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        if not self.adapts:
            return self._adapt(problem)
        part = Part.of(problem, self.adapts, query=False)
        inner = self._adapt(part.problem)
        return replace(inner, params=part.all(inner.params), curvature=None)

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        if not self.adapts:
            return self._meta_gradient(problem)
        part = Part.of(problem, self.adapts)
        inner, meta = self._meta_gradient(part.problem)
        meta = part.meta_gradient(inner, meta)
        return replace(inner, params=part.all(inner.params), curvature=None), meta

    def part(self, problem: TaskProblem) -> Part:
        """What adapts in these tasks; the linear system is that of its problem."""
        return Part.of(problem, self.adapts or ("",))

    def adapting(self, layout: ParameterLayout) -> ParameterLayout:
        """The layout of those of the model's parameters that adapt. Raises what `names_under` raises."""
        return sublayout(layout, names_under(layout, self.adapts, "adapts")) if self.adapts else layout

    def _adapt(self, problem: TaskProblem) -> InnerSolution:
        return self.inner.solve(problem, None if self.reference_inner else self.proximal(problem))

    def _meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """Of the parameters that adapt."""
        proximal = self.proximal(problem)
        if not self.reference_inner:
            products = not isinstance(self.solver, Dual)  # which works with the factors
            inner = self.inner.solve(problem, proximal, curvature=self.solver.operator if products else None)
        else:
            assert isinstance(self.inner, GradientDescent)
            inner = self._adapt(problem)
            inner = pull_back(problem.support_loss, problem.anchor, inner, lr=self.inner.lr, proximal=proximal)
        problem.lap("inner")
        if self.lam_offset:
            proximal = ScalarProximal(self.strength.init + self.lam_offset)
        meta = self._implicit(problem, inner, proximal, self._curvature(problem, inner))
        if getattr(self.solver, "on_negative_curvature", "truncate") == "gauss_newton":
            meta = self._redo_with_gauss_newton(problem, inner, proximal, meta)
        if self.strength.learn:
            rows = self.strength.parametrisation(problem.functional.layout).pull_back(_raw(problem.own), meta.own)
            return inner, replace(meta, own={LAM + name: row for name, row in rows.items()})
        return inner, replace(meta, own={})

    def _curvature(self, problem: TaskProblem, inner: InnerSolution) -> Matvec | None:
        """The operator at phi: the inner solver's if it hands one on; None is the Hessian, not yet linearised."""
        if inner.curvature is not None:
            return inner.curvature
        return problem.gauss_newton(inner.params) if self.solver.operator == "gauss_newton" else None

    def _implicit(
        self, problem: TaskProblem, inner: InnerSolution, proximal: Proximal, curvature: Matvec | None
    ) -> MetaGradient:
        def solve(system: ProximalSystem, v: Tensor) -> LinearSolution:
            problem.lap("query")
            return self.solver.solve(replace(system, precision=problem.functional.precision), v)

        return implicit_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            inner.params,
            problem.anchor,
            proximal=proximal,
            solve=solve,
            curvature=curvature,
            damping=self.solver.damping,
        )

    def _redo_with_gauss_newton(
        self, problem: TaskProblem, inner: InnerSolution, proximal: Proximal, meta: MetaGradient
    ) -> MetaGradient:
        """`meta`, its tasks with negative curvature solved again; their outcome stays, so that the fallback is counted."""
        old = meta.solution
        assert old is not None
        redo = old.outcome == int(Outcome.NEGATIVE_CURVATURE)
        if not bool(redo.any()):
            return meta
        again = self._implicit(problem, inner, proximal, problem.gauss_newton(inner.params))
        new = again.solution
        assert new is not None

        def chosen(there: Tensor, here: Tensor) -> Tensor:
            return torch.where(redo.reshape(-1, *(1,) * (here.dim() - 1)), there, here)

        solution = LinearSolution(
            value=chosen(new.value, old.value),
            outcome=torch.where(redo & (new.outcome == int(Outcome.NON_FINITE)), new.outcome, old.outcome),
            iterations=chosen(new.iterations, old.iterations),
            residual=chosen(new.residual, old.residual),
            unsolved=None if new.unsolved is None else redo & new.unsolved,
        )
        own = {name: chosen(again.own[name], row) for name, row in meta.own.items()}
        return replace(meta, gradient=chosen(again.gradient, meta.gradient), solution=solution, own=own)


def _raw(own: object) -> dict[str, Tensor]:
    """Lambda's unconstrained parameters out of the algorithm's own ones."""
    assert isinstance(own, dict)
    return {name.removeprefix(LAM): value for name, value in own.items()}
