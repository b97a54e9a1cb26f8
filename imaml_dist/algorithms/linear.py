"""The choices of a linear solver, as records: how `(C + Lambda + mu I) u = v` is solved.

Every record has `operator` (C is the `gauss_newton` matrix, positive semi-definite, or the `hessian` of the paper),
`damping` (mu >= 0, for stability) and `solve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from imaml_dist.algorithms.problem import Operator
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.direct import direct
from imaml_dist.core.linear.dual import dual_gauss_newton
from imaml_dist.core.linear.minres import minres
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.nystrom import nystrom, nystrom_preconditioner
from imaml_dist.core.linear.solution import LinearSolution
from imaml_dist.core.linear.system import ProximalSystem

NegativeCurvature = Literal["truncate", "gauss_newton", "exclude"]


class LinearSolver(Protocol):
    """A linear solver with its options."""

    @property
    def operator(self) -> Operator:
        """Which curvature."""
        ...

    @property
    def damping(self) -> float:
        """mu."""
        ...

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """`A u = v` for T tasks at once."""
        ...


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradient, truncated at negative curvature.

    Attributes:
        max_iterations: products with the curvature operator at most.
        rtol: relative residual at which a task's solve ends early; 0 spends the whole budget, or the type's digits.
        atol: absolute residual norm at which it ends early.
        on_negative_curvature: `truncate` keeps the last good iterate (the first-order direction if there is none),
            `gauss_newton` redoes the task with that operator, `exclude` drops the task from the step.
        preconditioner: `regulariser` (the inverse of `Lambda + mu I`; where Lambda is a multiple of I it would change nothing, and
            is left out), `nystrom` (costs `rank` products more) or `none`.
        rank: of the Nystrom preconditioner.
        start: `zero`, or `first_order`: `Lambda^-1 v`, from which one step more is one step beyond first-order MAML.
    """

    max_iterations: int = 5
    operator: Operator = "gauss_newton"
    rtol: float = 0.0
    damping: float = 0.0
    on_negative_curvature: NegativeCurvature = "truncate"
    atol: float = 0.0
    preconditioner: Literal["none", "regulariser", "nystrom"] = "regulariser"
    rank: int = 10
    start: Literal["zero", "first_order"] = "zero"

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        preconditioner = None
        if self.preconditioner == "nystrom":
            preconditioner = nystrom_preconditioner(system, v, rank=self.rank)
        elif self.preconditioner == "regulariser" and system.proximal.diagonal().numel() > 1:
            preconditioner = system.regulariser_solve
        return conjugate_gradient(
            system,
            v,
            max_iterations=self.max_iterations,
            rtol=self.rtol,
            atol=self.atol,
            x0=system.regulariser_solve(v) if self.start == "first_order" else None,
            preconditioner=preconditioner,
            precision=system.precision,
        )


@dataclass(frozen=True)
class Minres:
    """Minimal residuals: for systems that may be indefinite. Fields as in `ConjugateGradient`."""

    max_iterations: int = 10
    operator: Operator = "hessian"
    rtol: float = 0.0
    damping: float = 0.0

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        return minres(system, v, max_iterations=self.max_iterations, rtol=self.rtol)


@dataclass(frozen=True)
class Neumann:
    """Truncated Neumann series with step `scale` (null: chosen per task so that it converges). Fields as in `ConjugateGradient`."""

    max_iterations: int = 20
    operator: Operator = "gauss_newton"
    rtol: float = 0.0
    damping: float = 0.0
    on_negative_curvature: NegativeCurvature = "truncate"
    scale: float | None = None

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        return neumann(system, v, max_iterations=self.max_iterations, scale=self.scale, rtol=self.rtol)


@dataclass(frozen=True)
class Nystrom:
    """Randomised low-rank approximation of the curvature, inverted exactly; `rank` products.

    `rtol` is the residual below which a solve counts as converged.
    """

    rank: int = 20
    operator: Operator = "gauss_newton"
    rtol: float = 0.0
    damping: float = 0.0

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        return nystrom(system, v, rank=self.rank, rtol=self.rtol)


@dataclass(frozen=True)
class Dual:
    """The exact Gauss-Newton solve in the space of the outputs; no iteration."""

    damping: float = 0.0

    @property
    def operator(self) -> Operator:
        """Always Gauss-Newton."""
        return "gauss_newton"

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        return dual_gauss_newton(system, v)


@dataclass(frozen=True)
class Direct:
    """The dense matrix, formed and solved: ground truth for models of at most `max_size` parameters."""

    operator: Operator = "hessian"
    damping: float = 0.0
    max_size: int = 4096

    def solve(self, system: ProximalSystem, v: Tensor) -> LinearSolution:
        """See `LinearSolver.solve`."""
        return direct(system, v, max_size=self.max_size)
