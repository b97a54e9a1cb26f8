"""Every field of a sweep: a base configuration, a space over its fields, who searches it, and how much may be spent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from imaml_dist.config.section import Section, by_kind

MOST_TRIALS = 10_000


class _RangeSpace(Section):
    """Between two numbers."""

    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> _RangeSpace:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} given with high {self.high:g}; low is less than high")
        return self


class UniformSpace(_RangeSpace):
    """Any number between two, each alike."""

    kind: Literal["uniform"] = "uniform"


class LogUniformSpace(_RangeSpace):
    """Any number between two, each order of magnitude alike."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0)


class IntSpace(Section):
    """A whole number between two, both included."""

    kind: Literal["int"] = "int"
    low: int = Field(ge=-(2**53), le=2**53)
    high: int = Field(ge=-(2**53), le=2**53)
    log: bool = False
    """Each order of magnitude alike."""

    @model_validator(mode="after")
    def _in_order(self) -> IntSpace:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} given with high {self.high}; low is less than high")
        if self.log and self.low < 1:
            raise ValueError(f"low {self.low} given with log; low is at least 1 there")
        return self


class _ValuesSpace(Section):
    """One of some values, of any type that the field takes: a whole section, too."""

    values: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> _ValuesSpace:
        twice = [value for number, value in enumerate(self.values) if value in self.values[:number]]
        if twice:
            raise ValueError(f"values has {twice[0]!r} twice; give each once")
        return self


class ChoiceSpace(_ValuesSpace):
    """One of the values, each alike."""

    kind: Literal["choice"] = "choice"


class GridSpace(_ValuesSpace):
    """Every one of the values, in turn."""

    kind: Literal["grid"] = "grid"


Space = Annotated[
    Annotated[UniformSpace, Tag("uniform")]
    | Annotated[LogUniformSpace, Tag("loguniform")]
    | Annotated[IntSpace, Tag("int")]
    | Annotated[ChoiceSpace, Tag("choice")]
    | Annotated[GridSpace, Tag("grid")],
    by_kind("uniform", "loguniform", "int", "choice", "grid"),
]
"""What values a field may have."""


class SpaceOfField(Section):
    """One field's space, to be checked by itself."""

    space: Space


class RandomSearcherConfig(Section):
    """Values drawn by chance, trial by trial; those of grids in turn."""

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, lt=2**63)


class GridSearcherConfig(Section):
    """Every combination, the last field's values changing first."""

    kind: Literal["grid"] = "grid"


class OptunaSearcherConfig(Section):
    """Optuna's tree-structured Parzen estimator: values near those that did well."""

    kind: Literal["optuna"] = "optuna"
    seed: int = Field(0, ge=0, lt=2**63)
    startup: int = Field(10, ge=1)
    """Trials drawn by chance before it."""


SearcherConfig = Annotated[
    Annotated[RandomSearcherConfig, Tag("random")]
    | Annotated[GridSearcherConfig, Tag("grid")]
    | Annotated[OptunaSearcherConfig, Tag("optuna")],
    by_kind("random", "grid", "optuna"),
]


class NoSchedulerConfig(Section):
    """Every trial is trained to its end."""

    kind: Literal["none"] = "none"


class AshaConfig(Section):
    """Asynchronous successive halving: only the best of those that came as far train on."""

    kind: Literal["asha"] = "asha"
    grace: int = Field(50, ge=1)
    """Meta-steps before which no trial is stopped."""
    reduction: float = Field(3.0, gt=1)
    """One in so many trains on, and so many times longer."""


class MedianConfig(Section):
    """A trial is stopped whose best validation is below the median of the others' means up to the same meta-step."""

    kind: Literal["median"] = "median"
    grace: int = Field(50, ge=1)
    min_trials: int = Field(3, ge=1)
    """Others that must have come as far."""


SchedulerConfig = Annotated[
    Annotated[NoSchedulerConfig, Tag("none")]
    | Annotated[AshaConfig, Tag("asha")]
    | Annotated[MedianConfig, Tag("median")],
    by_kind("none", "asha", "median"),
]


class BudgetConfig(Section):
    """How many trials, and how much for each."""

    trials: int | None = Field(None, ge=1, le=MOST_TRIALS)
    """null is every point of a grid."""
    steps: int | None = Field(None, ge=1, le=10**9)
    """Meta-steps of a trial; null is the base's `run.steps`."""
    seconds: float | None = Field(None, gt=0)
    """Of training of a trial; null is the base's `run.max_seconds`."""


class SweepValidationConfig(Section):
    """The frozen tasks that all trials are measured on."""

    tasks: int = Field(200, ge=2, le=1 << 20)


class SweepConfig(Section):
    """A whole sweep."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str | dict[str, Any]
    """A configuration, or the path of one beside the sweep's file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of the base that all trials have otherwise, by dotted name."""
    space: dict[str, Space] = Field(min_length=1)
    """What is searched, by dotted name of any field."""
    baseline: bool = False
    """Trial 0 has the base's own values, to compare with; they must lie within the space."""
    searcher: SearcherConfig = RandomSearcherConfig()
    scheduler: SchedulerConfig = NoSchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    validation: SweepValidationConfig = SweepValidationConfig()
    max_concurrent: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_TRIALS)] = "auto"
    """Trials at a time; `auto` is as many as the cluster has room for."""
    retries: int = Field(1, ge=0, le=100)
    """How often a trial that crashed is started again before that is recorded as its end."""
