"""The choices that make up an algorithm: inner solver, linear solver, operator, proximal strength.

Records only hold facts. `imaml_dist.algorithms.learner.MetaLearner` acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Operator = Literal["hessian", "gauss_newton"]
NegativeCurvature = Literal["truncate", "gauss_newton", "exclude"]


@dataclass(frozen=True)
class GradientDescent:
    """Inner solver: `steps` steps of plain gradient descent with step size `lr`."""

    lr: float = 0.1
    steps: int = 16


@dataclass(frozen=True)
class ConjugateGradient:
    """Linear solver of the implicit gradient.

    Attributes:
        max_iterations: products with the curvature operator at most.
        operator: `gauss_newton` (positive semi-definite, the default) or the `hessian` of the paper.
        rtol: relative residual at which a task's solve ends early; 0 spends the whole budget.
        damping: mu >= 0 added to the system for stability.
        on_negative_curvature: `truncate` keeps the last good iterate (the first-order direction if there is none),
            `gauss_newton` redoes the task with that operator, `exclude` drops the task from the step.
    """

    max_iterations: int = 5
    operator: Operator = "gauss_newton"
    rtol: float = 0.0
    damping: float = 0.0
    on_negative_curvature: NegativeCurvature = "truncate"


@dataclass(frozen=True)
class IMAML:
    """Implicit MAML: proximal inner problem, implicit meta-gradient.

    Attributes:
        lam: proximal strength lambda > 0.
        inner: how phi is found.
        solver: how `(curvature + lambda) u = v` is solved.

    Source: Rajeswaran et al. (2019).
    """

    lam: float = 0.1
    inner: GradientDescent = field(default_factory=GradientDescent)
    solver: ConjugateGradient = field(default_factory=ConjugateGradient)


@dataclass(frozen=True)
class FOMAML:
    """First-order MAML: no proximal term, the query gradient at phi is the meta-gradient.

    Source: Finn et al. (2017), section 5.2.
    """

    inner: GradientDescent = field(default_factory=GradientDescent)


Algorithm = IMAML | FOMAML
