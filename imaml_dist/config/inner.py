"""Every field of `algorithm.inner`: the inner solvers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from imaml_dist.config.section import Section, by_kind

Operator = Literal["gauss_newton", "hessian"]
"""Which curvature of the support loss."""


class _DescentConfig(Section):
    lr: float = Field(0.1, gt=0)
    """Step size."""
    steps: int = Field(16, ge=1, le=10**6)
    tolerance: float = Field(0.0, ge=0, lt=1)
    """A task stops when the gradient of its objective is this fraction of the one it began with; 0 does all steps. Of
    `imaml` and `fomaml`."""


class GradientDescentConfig(_DescentConfig):
    """Plain gradient descent."""

    kind: Literal["gradient_descent"] = "gradient_descent"


class MomentumConfig(_DescentConfig):
    """Gradient descent with momentum, as torch's SGD."""

    kind: Literal["momentum"] = "momentum"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False


class AdamConfig(_DescentConfig):
    """Adam, as torch's."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(0.01, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)


class LBFGSConfig(Section):
    """Quasi-Newton steps with a line search, one gradient each."""

    kind: Literal["lbfgs"] = "lbfgs"
    lr: float = Field(0.1, gt=0)
    """Of the first step, before any curvature is known."""
    steps: int = Field(16, ge=1, le=10**6)
    """Gradients at most."""
    memory: int = Field(5, ge=1, le=1000)
    """Pairs of steps and gradient changes kept."""
    tolerance: float = Field(0.0, ge=0, lt=1)


class NewtonCGConfig(Section):
    """The paper's Hessian-free inner solver."""

    kind: Literal["newton_cg"] = "newton_cg"
    steps: int = Field(5, ge=1, le=10**6)
    """Newton steps at most."""
    cg_iterations: int = Field(5, ge=1)
    """For each direction."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    operator: Operator = "gauss_newton"
    damping: float = Field(1.0, ge=0)
    """Levenberg-Marquardt damping to begin with."""


UnrolledInnerConfig = Annotated[
    Annotated[GradientDescentConfig, Tag("gradient_descent")]
    | Annotated[MomentumConfig, Tag("momentum")]
    | Annotated[AdamConfig, Tag("adam")],
    by_kind("gradient_descent", "momentum", "adam"),
]
"""Inner solvers that are a sequence of updates."""

InnerConfig = Annotated[
    Annotated[GradientDescentConfig, Tag("gradient_descent")]
    | Annotated[MomentumConfig, Tag("momentum")]
    | Annotated[AdamConfig, Tag("adam")]
    | Annotated[LBFGSConfig, Tag("lbfgs")]
    | Annotated[NewtonCGConfig, Tag("newton_cg")],
    by_kind("gradient_descent", "momentum", "adam", "lbfgs", "newton_cg"),
]
