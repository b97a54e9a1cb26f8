"""The choices of an inner solver, as records: how task parameters phi are found from theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

from imaml_dist.algorithms.problem import Operator, TaskProblem
from imaml_dist.core.inner.adam import AdamRule
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.gradient_descent import GradientDescentRule
from imaml_dist.core.inner.lbfgs import lbfgs
from imaml_dist.core.inner.momentum import MomentumRule
from imaml_dist.core.inner.newton_cg import newton_cg
from imaml_dist.core.inner.rule import Rule
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.proximal.protocol import Proximal


class InnerSolver(Protocol):
    """Solves `min_phi L(phi) + R(phi - theta)` for T tasks at once."""

    def solve(
        self, problem: TaskProblem, proximal: Proximal | None, curvature: Operator | None = None
    ) -> InnerSolution:
        """Without a regulariser when `proximal` is None; products with `curvature` at phi are handed on where they come for free."""
        ...


@dataclass(frozen=True)
class _Descent(ABC):
    """What the first-order inner solvers share.

    Attributes:
        lr: step size > 0.
        steps: number of steps at most.
        tolerance: a task stops when `||grad G(phi)|| <= tolerance ||grad G(theta)||`; 0 does all steps. For IMAML and FOMAML;
            the algorithms that go through every step refuse it.
    """

    lr: float = 0.1
    steps: int = 16
    tolerance: float = 0.0

    @abstractmethod
    def rule(self) -> Rule:
        """The update rule."""

    def solve(
        self, problem: TaskProblem, proximal: Proximal | None, curvature: Operator | None = None
    ) -> InnerSolution:
        """See `InnerSolver.solve`."""
        return descend(
            problem.support_loss,
            problem.anchor,
            self.rule(),
            steps=self.steps,
            tolerance=self.tolerance,
            proximal=proximal,
            linearise=None if curvature is None else problem.linearise(curvature),
        )


@dataclass(frozen=True)
class GradientDescent(_Descent):
    """Plain gradient descent: `phi <- phi - lr grad G(phi)`."""

    def rule(self) -> Rule:
        """See `_Descent.rule`."""
        return GradientDescentRule(self.lr)


@dataclass(frozen=True)
class Momentum(_Descent):
    """Gradient descent with momentum, as torch's SGD defines it; `nesterov` for Nesterov's form."""

    momentum: float = 0.9
    nesterov: bool = False

    def rule(self) -> Rule:
        """See `_Descent.rule`."""
        return MomentumRule(self.lr, self.momentum, self.nesterov)


@dataclass(frozen=True)
class Adam(_Descent):
    """Adam, as torch defines it."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rule(self) -> Rule:
        """See `_Descent.rule`."""
        return AdamRule(self.lr, self.beta1, self.beta2, self.eps)


FirstOrder = GradientDescent | Momentum | Adam
"""Inner solvers that are a sequence of updates, and so can be unrolled."""


def refuse_tolerance(algorithm: str, inner: FirstOrder) -> None:
    """For algorithms whose meta-training takes every step of the inner solver, whatever the gradient.

    Raises:
        ValueError: the inner solver has a tolerance, by which it would stop earlier at meta-test than in meta-training.
    """
    if inner.tolerance > 0:
        raise ValueError(
            f"inner.tolerance: {inner.tolerance} given, but {algorithm} takes all inner steps in meta-training; set it to 0, or use "
            "IMAML or FOMAML, which stop a task early"
        )


@dataclass(frozen=True)
class LBFGS:
    """Quasi-Newton steps with a line search, one gradient each.

    Attributes:
        lr: the first step is `-lr M grad G`, M the identity where Lambda is one number (`core.inner.lbfgs`); > 0.
        steps: gradients at most, besides the first.
        memory: pairs of steps and gradient changes that the curvature is learned from.
        tolerance: a task stops when `||grad G(phi)|| <= tolerance ||grad G(theta)||`.
    """

    lr: float = 0.1
    steps: int = 16
    memory: int = 5
    tolerance: float = 0.0

    def solve(
        self, problem: TaskProblem, proximal: Proximal | None, curvature: Operator | None = None
    ) -> InnerSolution:
        """See `InnerSolver.solve`."""
        return lbfgs(
            problem.support_loss,
            problem.anchor,
            steps=self.steps,
            lr=self.lr,
            memory=self.memory,
            tolerance=self.tolerance,
            proximal=proximal,
            linearise=None if curvature is None else problem.linearise(curvature),
        )


@dataclass(frozen=True)
class NewtonCG:
    """The paper's Hessian-free inner solver: Newton-CG with line search and Levenberg-Marquardt damping.

    Attributes:
        steps: Newton steps at most.
        cg_iterations: conjugate gradient steps for each direction.
        tolerance: a task stops when `||grad G(phi)|| <= tolerance ||grad G(theta)||`.
        operator: curvature of the directions.
        damping: initial Levenberg-Marquardt damping, >= 0.
    """

    steps: int = 5
    cg_iterations: int = 5
    tolerance: float = 0.0
    operator: Operator = "gauss_newton"
    damping: float = 1.0

    def solve(
        self, problem: TaskProblem, proximal: Proximal | None, curvature: Operator | None = None
    ) -> InnerSolution:
        """See `InnerSolver.solve`."""
        found = newton_cg(
            problem.support_loss,
            problem.anchor,
            steps=self.steps,
            cg_iterations=self.cg_iterations,
            tolerance=self.tolerance,
            proximal=proximal,
            damping=self.damping,
            linearise=problem.linearise(self.operator),
        )
        return found if curvature == self.operator else replace(found, curvature=None)
