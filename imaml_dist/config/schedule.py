"""How a number of the algorithm changes while a run goes on: by a schedule over updates, or by what the solves come to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from imaml_dist.config.section import Section


class ScheduleConfig(Section):
    """From the configured value to another one; where it ends it stays."""

    kind: Literal["constant", "linear", "cosine", "step"] = "linear"
    to: float | None = Field(None, gt=0)
    """Where it ends; null for `constant` alone."""
    updates: int = Field(1000, ge=1, le=10**9)
    """Applied meta-steps that it takes; a skipped one is none."""
    stages: int = Field(1, ge=1, le=10**6)
    """Of `step`: equal jumps on the way, the last one at its end."""

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> ScheduleConfig:
        if self.kind == "constant" and self.to is not None:
            raise ValueError(f".to: {self.to} given, but a constant goes nowhere; remove it or change the kind")
        if self.kind != "constant" and self.to is None:
            raise ValueError(f".to: is missing, but {self.kind!r} must end somewhere; add it, for example to: 1.0")
        if self.kind != "step" and self.stages != 1:
            raise ValueError(
                f".stages: {self.stages} given, but {self.kind!r} has no stages; remove it or take kind: step"
            )
        return self


class AdaptConfig(Section):
    """A cap on iterations that follows the residual: one more where solves end above it, one less where far below."""

    residual: float = Field(0.1, gt=0)
    """Mean relative residual to reach; below half of it the cap sinks."""
    fewest: int = Field(1, ge=1)
    most: int = Field(20, ge=1)
    every: int = Field(10, ge=1, le=10**6)
    """Updates over which the mean is taken, and between two changes."""

    @model_validator(mode="after")
    def _in_order(self) -> AdaptConfig:
        if self.fewest > self.most:
            raise ValueError(f".fewest: {self.fewest} given with adapt.most {self.most}; fewest is at most most")
        return self
