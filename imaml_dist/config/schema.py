"""Every field of an experiment: its type, its unit, its range and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Frozen; unknown keys, numbers in quotes, booleans for numbers, nan and inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which episodes."""

    url: str = "data/glyphs"
    """Folder of `index.json`: a path or `file://` URL."""
    way: int = Field(5, ge=2)
    """N, classes per episode."""
    shot: int = Field(1, ge=1)
    """K, support images per class."""
    query: int = Field(5, ge=1)
    """Q, query images per class in training and validation."""


class Conv4Config(Section):
    """The reference's Omniglot network."""

    kind: Literal["conv4"] = "conv4"
    channels: int = Field(64, ge=1, le=1 << 16)


class MLPConfig(Section):
    """A multilayer perceptron over flattened images."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(ge=1)]] = [256, 128]


class UserModelConfig(BaseModel):
    """A user's own network: `kind` names a factory called as `factory(image_shape=(C, H, W), way=N, **other fields)`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

    @property
    def options(self) -> dict[str, Any]:
        """The other fields."""
        return dict(self.model_extra or {})


def _model_tag(value: Any) -> str | None:
    kind = value.get("kind", "conv4") if isinstance(value, dict) else getattr(value, "kind", None)
    return "user" if isinstance(kind, str) and ":" in kind else kind


ModelConfig = Annotated[
    Annotated[Conv4Config, Tag("conv4")] | Annotated[MLPConfig, Tag("mlp")] | Annotated[UserModelConfig, Tag("user")],
    Discriminator(
        _model_tag,
        custom_error_type="kind",
        custom_error_message="Input should be 'conv4', 'mlp' or a factory 'package.module:function'",
    ),
]


class InnerConfig(Section):
    """How a task's parameters phi are found."""

    kind: Literal["gradient_descent"] = "gradient_descent"
    lr: float = Field(0.1, gt=0)
    """Step size."""
    steps: int = Field(16, ge=1)


class SolverConfig(Section):
    """How `(curvature + lambda) u = v` is solved."""

    kind: Literal["conjugate_gradient"] = "conjugate_gradient"
    operator: Literal["gauss_newton", "hessian"] = "gauss_newton"
    max_iterations: int = Field(5, ge=1)
    rtol: float = Field(0.0, ge=0)
    """Relative residual at which a task's solve ends early; 0 spends the whole budget."""
    damping: float = Field(0.0, ge=0)
    on_negative_curvature: Literal["truncate", "gauss_newton", "exclude"] = "truncate"


class IMAMLConfig(Section):
    """Implicit MAML."""

    kind: Literal["imaml"] = "imaml"
    preset: Literal["default", "paper"] = "default"
    """`default`: Gauss-Newton, lambda 0.1. `paper`: Hessian, lambda 2, outer rate 1e-3, 16 (20-way: 25) inner steps."""
    lam: float = Field(0.1, gt=0)
    """Proximal strength lambda, in loss per squared parameter."""
    inner: InnerConfig = InnerConfig()
    solver: SolverConfig = SolverConfig()


class FOMAMLConfig(Section):
    """First-order MAML, the baseline."""

    kind: Literal["fomaml"] = "fomaml"
    inner: InnerConfig = InnerConfig()


def _algorithm_tag(value: Any) -> str | None:
    return value.get("kind", "imaml") if isinstance(value, dict) else getattr(value, "kind", None)


AlgorithmConfig = Annotated[
    Annotated[IMAMLConfig, Tag("imaml")] | Annotated[FOMAMLConfig, Tag("fomaml")],
    Discriminator(_algorithm_tag, custom_error_type="kind", custom_error_message="Input should be 'imaml' or 'fomaml'"),
]


class OuterConfig(Section):
    """How the meta-parameters are stepped."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(3.0e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from `lr` towards 0 over `run.steps`."""
    warmup: int = Field(0, ge=0, le=10**9)
    """Steps over which the rate rises linearly to `lr`."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the mean meta-gradient."""
    weight_decay: float = Field(0.0, ge=0)


class RunConfig(Section):
    """How long, on what, and in which pieces."""

    steps: int = Field(2000, ge=1, le=10**9)
    """Meta-steps."""
    max_seconds: float | None = Field(None, gt=0)
    """Wall-clock limit of the training loop, over all restarts; outside of the same-bits promise."""
    tasks_per_step: int = Field(16, ge=1, le=1 << 20)
    chunk: int = Field(4, ge=1)
    """Tasks per unit of work; divides `tasks_per_step`."""
    workers: int = Field(2, ge=1, le=1 << 16)
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per worker."""
    execution: Literal["auto", "vmap", "loop"] = "auto"
    """Tasks of a chunk in one vectorised call, or one after the other; resolved when the run begins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Resolved when the run begins."""
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(50, ge=1)
    """Meta-steps."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints kept, besides the best by validation."""
    backend: Literal["ray", "local"] = "ray"
    reduction: Literal["exact", "fast"] = "exact"
    """`exact`: the same bits for any number of workers. `fast`: one plain all-reduce."""


class ValidateConfig(Section):
    """Validation during training."""

    every: int = Field(200, ge=1)
    """Meta-steps."""
    tasks: int = Field(200, ge=0)
    """0 switches validation off."""


class EvaluateConfig(Section):
    """The evaluation that ends a run."""

    tasks: int = Field(600, ge=0)
    """0 switches it off."""
    query: int = Field(15, ge=1)
    """Query images per class."""


class TrackingConfig(Section):
    """MLflow. The server comes from `MLFLOW_TRACKING_URI`; without it, `mlflow.db` beside the run directory."""

    experiment: str | None = None
    """The run's `name` when null."""
    mlflow: bool = True


class ExperimentConfig(Section):
    """A whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataConfig = DataConfig()
    model: ModelConfig = Conv4Config()
    algorithm: AlgorithmConfig = IMAMLConfig()
    outer: OuterConfig = OuterConfig()
    run: RunConfig = RunConfig()
    # `validate` is a method name of pydantic's own base class, hence the alias.
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        """Fill what a preset says and the user does not."""
        algorithm = raw.get("algorithm") if isinstance(raw, dict) else None
        if not (isinstance(algorithm, dict) and algorithm.get("preset") == "paper"):
            return raw
        data, outer = raw.get("data") or {}, raw.get("outer") or {}
        inner, solver = algorithm.get("inner") or {}, algorithm.get("solver") or {}
        if not all(isinstance(section, dict) for section in (data, outer, inner, solver)):
            return raw
        way = data.get("way", 5)
        steps = 25 if isinstance(way, int) and way >= 20 else 16
        filled = {
            "lam": 2.0,
            **algorithm,
            "inner": {"lr": 0.1, "steps": steps, **inner},
            "solver": {"operator": "hessian", "max_iterations": 5, **solver},
        }
        return {**raw, "algorithm": filled, "outer": {"optimizer": "adam", "lr": 1.0e-3, **outer}}

    @model_validator(mode="after")
    def _whole_chunks(self) -> ExperimentConfig:
        if self.run.tasks_per_step % self.run.chunk:
            raise ValueError(
                f"run.tasks_per_step: {self.run.tasks_per_step} given, "
                f"must be a multiple of run.chunk = {self.run.chunk}; change one of the two"
            )
        return self
