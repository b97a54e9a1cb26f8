"""Every field of the `algorithm` section: the algorithms, their linear solvers and proximal strengths."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from imaml_dist.config.inner import GradientDescentConfig, InnerConfig, Operator, UnrolledInnerConfig
from imaml_dist.config.schedule import AdaptConfig, ScheduleConfig
from imaml_dist.config.section import Section, by_kind

NegativeCurvature = Literal["truncate", "gauss_newton", "exclude"]


class ConjugateGradientConfig(Section):
    """Conjugate gradient, truncated at negative curvature."""

    kind: Literal["conjugate_gradient"] = "conjugate_gradient"
    operator: Operator = "gauss_newton"
    max_iterations: int = Field(5, ge=1)
    rtol: float = Field(0.0, ge=0)
    """Relative residual at which a task's solve ends early; 0 spends the whole budget, or the type's digits."""
    damping: float = Field(0.0, ge=0)
    on_negative_curvature: NegativeCurvature = "truncate"
    atol: float = Field(0.0, ge=0)
    """Residual norm at which a task's solve ends early."""
    preconditioner: Literal["none", "regulariser", "nystrom"] = "regulariser"
    rank: int = Field(10, ge=1)
    """Of the Nystrom preconditioner."""
    start: Literal["zero", "first_order"] = "zero"
    schedule: ScheduleConfig | None = None
    """Of `max_iterations`, rounded; null keeps it."""
    adapt: AdaptConfig | None = None
    """`max_iterations` follows the residual; null keeps it."""

    @model_validator(mode="after")
    def _one_hand_on_the_cap(self) -> ConjugateGradientConfig:
        schedule, adapt, cap = self.schedule, self.adapt, self.max_iterations
        if schedule is not None and adapt is not None:
            raise ValueError(
                "algorithm.solver.adapt: given together with algorithm.solver.schedule, and both decide max_iterations; remove one"
            )
        if schedule is not None and schedule.to is not None and (schedule.to < 1 or schedule.to % 1):
            raise ValueError(
                f"algorithm.solver.schedule.to: {schedule.to} given, iterations are a whole number of at least 1; round it"
            )
        if adapt is not None and not adapt.fewest <= cap <= adapt.most:
            raise ValueError(
                f"algorithm.solver.max_iterations: {cap} given, must be within adapt.fewest = {adapt.fewest} and "
                f"adapt.most = {adapt.most}, for it is where the cap begins; change one of the three"
            )
        return self


class MinresConfig(Section):
    """Minimal residuals, for indefinite systems."""

    kind: Literal["minres"] = "minres"
    operator: Operator = "hessian"
    max_iterations: int = Field(10, ge=1)
    rtol: float = Field(0.0, ge=0)
    damping: float = Field(0.0, ge=0)


class NeumannConfig(Section):
    """Truncated Neumann series."""

    kind: Literal["neumann"] = "neumann"
    operator: Operator = "gauss_newton"
    max_iterations: int = Field(20, ge=1)
    rtol: float = Field(0.0, ge=0)
    damping: float = Field(0.0, ge=0)
    on_negative_curvature: NegativeCurvature = "truncate"
    scale: float | None = Field(None, gt=0)
    """Step of the series, below 2 over the largest eigenvalue; null chooses it per task."""


class NystromConfig(Section):
    """Randomised low-rank approximation of the curvature."""

    kind: Literal["nystrom"] = "nystrom"
    operator: Operator = "gauss_newton"
    rank: int = Field(20, ge=1)
    rtol: float = Field(0.0, ge=0)
    """Residual below which a solve counts as converged."""
    damping: float = Field(0.0, ge=0)


class DualConfig(Section):
    """The exact Gauss-Newton solve in the space of the outputs."""

    kind: Literal["dual"] = "dual"
    damping: float = Field(0.0, ge=0)


class DirectConfig(Section):
    """The dense matrix, for models of a few thousand parameters."""

    kind: Literal["direct"] = "direct"
    operator: Operator = "hessian"
    damping: float = Field(0.0, ge=0)
    max_size: int = Field(4096, ge=1)
    """Largest number of parameters."""


SolverConfig = Annotated[
    Annotated[ConjugateGradientConfig, Tag("conjugate_gradient")]
    | Annotated[MinresConfig, Tag("minres")]
    | Annotated[NeumannConfig, Tag("neumann")]
    | Annotated[NystromConfig, Tag("nystrom")]
    | Annotated[DualConfig, Tag("dual")]
    | Annotated[DirectConfig, Tag("direct")],
    by_kind("conjugate_gradient", "minres", "neumann", "nystrom", "dual", "direct"),
]


class StrengthConfig(Section):
    """A proximal strength of another shape than one number, or a learned one."""

    kind: Literal["scalar", "per_layer", "diagonal", "low_rank", "kronecker"] = "scalar"
    init: float = Field(0.1, gt=0)
    learn: bool = False
    lr: float | None = Field(None, gt=0)
    """Outer learning rate of its logarithms; null is `outer.lr`."""
    rank: int = Field(4, ge=1)
    """Columns of `low_rank`'s factor."""
    layers: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Other initial strengths of layers, by name or leading part of a name (`head`); of `per_layer` and `diagonal`."""
    schedule: ScheduleConfig | None = None
    """Of a fixed scalar; null keeps it."""

    @model_validator(mode="after")
    def _layers_apart(self) -> StrengthConfig:
        if self.layers and self.kind not in ("per_layer", "diagonal"):
            raise ValueError(
                f"algorithm.lam.layers: given with algorithm.lam.kind {self.kind!r}, which has no strength for a layer; take per_layer or "
                "diagonal"
            )
        return self

    @model_validator(mode="after")
    def _scheduled_or_learned(self) -> StrengthConfig:
        if self.schedule is not None and self.learn:
            raise ValueError(
                "algorithm.lam.schedule: given together with algorithm.lam.learn, and both decide lambda; remove one"
            )
        if self.schedule is not None and self.kind != "scalar":
            raise ValueError(
                f"algorithm.lam.schedule: given with algorithm.lam.kind {self.kind!r}; a schedule is of a scalar, remove one of the two"
            )
        return self


def _strength_tag(value: Any) -> str:
    return "section" if isinstance(value, (dict, StrengthConfig)) else "number"


class IMAMLConfig(Section):
    """Implicit MAML."""

    kind: Literal["imaml"] = "imaml"
    preset: Literal["default", "paper", "reference"] = "default"
    """`default`: Gauss-Newton, lambda 0.1. `paper`: Hessian, lambda 2, outer rate 1e-3, 16 (20-way: 25) inner steps.
    `reference`: what the paper's public code computes."""
    lam: Annotated[
        Annotated[float, Field(gt=0), Tag("number")] | Annotated[StrengthConfig, Tag("section")],
        Discriminator(_strength_tag),
    ] = 0.1
    """Proximal strength lambda, in loss per squared parameter; or `{kind: diagonal, init: 0.1, learn: true, ...}`."""
    inner: InnerConfig = GradientDescentConfig()
    solver: SolverConfig = ConjugateGradientConfig()
    reference_inner: bool = False
    """Proximal term in one step after the inner loop instead of in every step, and none at meta-test."""
    lam_offset: float = Field(0.0, ge=0)
    """Added to lambda in the linear system alone."""
    adapts: list[str] = Field([])
    """Names, or dotted beginnings of names, of the parameters that adapt to a task (`head`); empty: all."""

    @model_validator(mode="after")
    def _reference_is_scalar(self) -> IMAMLConfig:
        if self.reference_inner or self.lam_offset:
            if not isinstance(self.lam, float):
                raise ValueError(
                    "algorithm.lam: reference_inner and lam_offset (preset reference) take a number, "
                    f"{self.lam.kind!r} given; use another preset"
                )
            if self.inner.kind != "gradient_descent":
                raise ValueError(
                    "algorithm.inner.kind: reference_inner and lam_offset (preset reference) take gradient_descent, "
                    f"{self.inner.kind!r} given; use another preset"
                )
        return self


class _EveryStepConfig(Section):
    """An algorithm whose meta-training takes every step of the inner solver, whatever the gradient."""

    @model_validator(mode="after")
    def _no_tolerance(self) -> Self:
        tolerance = self.inner.tolerance  # type: ignore[attr-defined]
        if tolerance > 0:
            raise ValueError(
                f"algorithm.inner.tolerance: {tolerance} given, but {self.kind!r} takes all inner steps; set it to 0, "  # type: ignore[attr-defined]
                "or use 'imaml' or 'fomaml', which stop a task early"
            )
        return self


class MAMLConfig(_EveryStepConfig):
    """MAML, of second order."""

    kind: Literal["maml"] = "maml"
    inner: UnrolledInnerConfig = GradientDescentConfig()


class FOMAMLConfig(Section):
    """First-order MAML, the baseline."""

    kind: Literal["fomaml"] = "fomaml"
    inner: InnerConfig = GradientDescentConfig()


class ReptileConfig(_EveryStepConfig):
    """Reptile."""

    kind: Literal["reptile"] = "reptile"
    inner: UnrolledInnerConfig = GradientDescentConfig()


class ANILConfig(_EveryStepConfig):
    """MAML whose inner loop moves the head alone."""

    kind: Literal["anil"] = "anil"
    inner: UnrolledInnerConfig = GradientDescentConfig()
    head: list[str] = Field([])
    """Names of the parameters that adapt, or their dotted beginnings; empty is the last layer."""


class MetaSGDConfig(_EveryStepConfig):
    """Learned step sizes."""

    kind: Literal["meta_sgd"] = "meta_sgd"
    inner: GradientDescentConfig = GradientDescentConfig()
    """`lr` is where every step size begins."""
    lr: float | None = Field(None, gt=0)
    """Outer learning rate of the step sizes; null is `outer.lr`."""


AlgorithmConfig = Annotated[
    Annotated[IMAMLConfig, Tag("imaml")]
    | Annotated[MAMLConfig, Tag("maml")]
    | Annotated[FOMAMLConfig, Tag("fomaml")]
    | Annotated[ReptileConfig, Tag("reptile")]
    | Annotated[ANILConfig, Tag("anil")]
    | Annotated[MetaSGDConfig, Tag("meta_sgd")],
    by_kind("imaml", "maml", "fomaml", "reptile", "anil", "meta_sgd"),
]
