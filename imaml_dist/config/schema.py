"""Every field of an experiment: its type, its unit, its range and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from imaml_dist.config.algorithm import AlgorithmConfig, IMAMLConfig
from imaml_dist.config.model import Conv4Config, ModelConfig
from imaml_dist.config.presets import fill_preset
from imaml_dist.config.section import Section
from imaml_dist.config.tracking import TrackingConfig


class AugmentConfig(Section):
    """What happens to training images, support and query alike; nothing by default. See `data.augment.Augmentation`."""

    flip: bool = False
    """Left to right, one image in two."""
    vertical_flip: bool = False
    quarter_turns: bool = False
    """0 to 3 of them; square images only."""
    crop: int = Field(0, ge=0, le=1 << 16)
    """Largest shift in pixels each way, less than a side; zeros move in."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest angle in degrees each way."""
    colour: float = Field(0.0, ge=0, le=1)
    """Largest change of brightness, contrast and saturation, as a share."""


class DataConfig(Section):
    """Which episodes."""

    url: str = "data/glyphs"
    """Folder of `index.json`: a path, a `file://` URL, or `s3://bucket/prefix`."""
    way: int = Field(5, ge=2)
    """N, classes per episode."""
    shot: int = Field(1, ge=1)
    """K, support images per class."""
    query: int = Field(5, ge=1)
    """Q, query images per class in training and validation."""
    pool: int | None = Field(None, ge=2)
    """P >= N, training classes that episodes are drawn from for `pool_steps` meta-steps, then others; null is all."""
    pool_steps: int = Field(100, ge=1)
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _pool_holds_an_episode(self) -> DataConfig:
        if self.pool is not None and self.pool < self.way:
            raise ValueError(
                f"data.pool: {self.pool} given, must be at least data.way = {self.way}, or null for all classes"
            )
        return self


class StorageConfig(Section):
    """How object storage is reached; nothing secret, credentials come from the environment. See `StorageOptions`."""

    endpoint: str | None = Field(None, pattern=r"^https?://[^@/]+/?$")
    """URL of an S3-compatible server; null takes `AWS_ENDPOINT_URL_S3`, or Amazon's."""
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """`auto` is `path` with an endpoint of one's own."""
    anonymous: bool = False
    """Sign nothing: for public buckets."""
    checksums: Literal["auto", "when_required", "when_supported"] = "auto"
    retry_seconds: float = Field(60.0, ge=0)
    """How long one operation may go on failing without progress."""
    connect_timeout: float = Field(5.0, gt=0)
    read_timeout: float = Field(20.0, gt=0)
    """Seconds without a byte."""
    min_bytes_per_second: float = Field(1024.0, ge=0)
    """A slower answer is dropped and asked for again."""
    connections: int = Field(8, ge=1, le=256)
    """Per worker."""
    cache: str | None = None
    """Folder of the node's cache, shared by its workers; null takes `$IMAML_CACHE`, or `imaml` in the user's cache folder."""
    cache_bytes: int = Field(10_000_000_000, ge=0)
    """Of all that the cache keeps; what was used least recently goes first."""
    prefetch: int = Field(8, ge=0, le=1024)
    """Chunks of episodes made ahead of their use, per worker."""


class OuterConfig(Section):
    """How the meta-parameters are stepped."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` adds `weight_decay` to the gradient, `adamw` shrinks the parameters by it beside the step."""
    lr: float = Field(3.0e-3, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of `sgd`."""
    nesterov: bool = False
    """Of `sgd` with momentum."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of `adam` and `adamw`, like `beta2` and `eps`."""
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1.0e-8, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from `lr` towards 0 over `run.steps` updates; a skipped meta-step is none."""
    warmup: int = Field(0, ge=0, le=10**9)
    """Updates over which the rate rises linearly to `lr`."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the mean meta-gradient, over all that is learned."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the model's parameters; those that the algorithm itself learns are never decayed."""

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> OuterConfig:
        foreign = ("beta1", "beta2", "eps") if self.optimizer == "sgd" else ("momentum", "nesterov")
        for name in foreign:
            given = getattr(self, name)
            if given != type(self).model_fields[name].default:
                raise ValueError(
                    f"outer.{name}: {given!r} given, but {self.optimizer!r} has no {name}; remove it or change outer.optimizer"
                )
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "outer.nesterov: True given, but it needs momentum; set outer.momentum, for example to 0.9"
            )
        return self


class WarmStartConfig(Section):
    """Meta-parameters to begin with, in place of random ones."""

    path: str | None = None
    """A run directory (its best checkpoint), a checkpoint folder, or a `.safetensors` file: a path or `file://` URL."""
    skip: list[str] = Field(default_factory=list)
    """Names, or leading parts of names (`head` is that of `head.weight`), of tensors that keep their initial values."""

    @model_validator(mode="after")
    def _skips_something(self) -> WarmStartConfig:
        if self.skip and self.path is None:
            raise ValueError(f"warm_start.skip: {self.skip!r} given without warm_start.path; add the path or remove it")
        return self


class WorkersConfig(Section):
    """Between how many workers a run may go on with, as nodes come and go."""

    min: int = Field(ge=1, le=1 << 16)
    max: int = Field(ge=1, le=1 << 16)

    @model_validator(mode="after")
    def _in_order(self) -> WorkersConfig:
        if self.min > self.max:
            raise ValueError(f"run.workers: min {self.min} given with max {self.max}; min is at most max")
        return self


class RunConfig(Section):
    """How long, on what, and in which pieces."""

    steps: int = Field(2000, ge=1, le=10**9)
    """Meta-steps."""
    max_seconds: float | None = Field(None, gt=0)
    """Wall-clock limit of the training loop, over all restarts; outside of the same-bits promise."""
    tasks_per_step: int = Field(16, ge=1, le=1 << 20)
    chunk: int = Field(4, ge=1)
    """Tasks per unit of work; divides `tasks_per_step`."""
    workers: Annotated[
        Annotated[int, Field(ge=1, le=1 << 16), Tag("number")] | Annotated[WorkersConfig, Tag("section")],
        Discriminator(lambda given: "section" if isinstance(given, dict | WorkersConfig) else "number"),
    ] = 2
    """A number, or `{min, max}`: then a lost node is gone on without, and a new one made use of."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per worker."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Share of a GPU that Ray reserves for a worker, where it has one; below 1 the trials of a sweep may share it."""
    execution: Literal["auto", "native", "vmap", "loop"] = "auto"
    """Tasks of a chunk in one call by our own CPU kernels or by torch's, or one after the other; resolved when the run begins."""
    precision: Literal["float32", "tf32", "bfloat16", "float64"] = "float32"
    """`tf32` and `bfloat16` round the factors of convolutions and products of matrices (the former on GPUs only); all else stays
    float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Resolved when the run begins."""
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(50, ge=1)
    """Meta-steps."""
    checkpoint_minutes: float | None = Field(None, gt=0)
    """At the latest so long after the last checkpoint."""
    give_up_after: int = Field(10, ge=1)
    """Skipped meta-steps in a row that end the run; a step is skipped when more than half of its tasks are excluded."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints kept, besides the best by validation."""
    backend: Literal["ray", "local"] = "ray"
    profile: int = Field(0, ge=0, le=1000)
    """Meta-steps whose time rank 0 splits into phases; 0 is none. One more is traced."""
    compare_every: int = Field(50, ge=1)
    """Meta-steps between two copies of the state that all workers compare, and go back to if a state was damaged since."""
    heartbeat_timeout: float = Field(30.0, gt=0)
    """Seconds without a sign of life after which a worker's process is replaced; it gives two a second."""
    collective_timeout: float = Field(120.0, gt=0)
    """Seconds that a worker waits for the others; longer than the slowest one is behind the fastest in a meta-step."""
    deal: Literal["speed", "even"] = "speed"
    """Chunks for each worker: more for faster ones, looked at whenever states are compared, or as even as can be."""
    reduction: Literal["exact", "fast"] = "exact"
    """`exact`: the same bits for any number of workers. `fast`: one plain all-reduce."""

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else (self.workers.min, self.workers.max)


class ValidateConfig(Section):
    """Validation during training."""

    every: int = Field(200, ge=1)
    """Meta-steps."""
    tasks: int = Field(200, ge=0)
    """0 switches validation off."""
    patience: int | None = Field(None, ge=1)
    """Validations in a row without a better accuracy that end the run; null trains on."""
    manifest: str | None = None
    """Frozen tasks to validate on, the first `tasks` of them; null draws from the val split with the run's seed."""

    def on_plateau(self, step: int, best: int) -> bool:
        """Whether validation has not become better for as many times as are waited for.

        Args:
            step: committed meta-steps.
            best: those at the best validation, -1 if there was none.
        """
        return self.patience is not None and best >= 0 and step - best >= self.patience * self.every

    @model_validator(mode="after")
    def _patience_has_something_to_look_at(self) -> ValidateConfig:
        if self.patience is not None and self.tasks == 0:
            raise ValueError(
                f"validate.patience: {self.patience} given, but validate.tasks = 0 validates nothing; give it tasks, or remove the patience"
            )
        return self


class EvaluateConfig(Section):
    """The evaluation that ends a run."""

    tasks: int = Field(600, ge=0)
    """0 switches it off."""
    query: int = Field(15, ge=1)
    """Query images per class."""


class ExperimentConfig(Section):
    """A whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataConfig = DataConfig()
    storage: StorageConfig = StorageConfig()
    model: ModelConfig = Conv4Config()
    algorithm: AlgorithmConfig = IMAMLConfig()
    loss: str = Field("cross_entropy", pattern=r"^(cross_entropy|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    """Or a function of one's own, `package.module:function`: `(outputs [T, n, N], labels [T, n]) -> [T]`."""
    outer: OuterConfig = OuterConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    run: RunConfig = RunConfig()
    # `validate` is a method name of pydantic's own base class, hence the alias.
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        return fill_preset(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _whole_chunks(self) -> ExperimentConfig:
        if self.run.tasks_per_step % self.run.chunk:
            raise ValueError(
                f"run.tasks_per_step: {self.run.tasks_per_step} given, "
                f"must be a multiple of run.chunk = {self.run.chunk}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _what_is_registered_is_tested(self) -> ExperimentConfig:
        if self.tracking.registered is not None and self.evaluate.tasks == 0:
            raise ValueError(
                f"tracking.register: {self.tracking.registered!r} given with evaluate.tasks = 0, but versions are compared by their "
                "test accuracy; give it tasks, or register nothing"
            )
        return self
