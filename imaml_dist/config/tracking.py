"""The `tracking` section: what of a run MLflow is told."""

from __future__ import annotations

from pydantic import Field, model_validator

from imaml_dist.config.section import Section


class TrackingConfig(Section):
    """MLflow. The server comes from `MLFLOW_TRACKING_URI`; without it, `mlflow.db` beside the run directory."""

    experiment: str | None = None
    """The run's `name` when null."""
    mlflow: bool = True
    # `register` is a method name of pydantic's own base class, hence the alias.
    registered: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", alias="register")
    """Name of the registered model that the run's best checkpoint becomes a version of; null registers nothing."""
    system_every: float = Field(10.0, ge=0)
    """Seconds between two looks at how busy the machines are; 0 is never."""

    @model_validator(mode="after")
    def _a_registry_needs_mlflow(self) -> TrackingConfig:
        if self.registered is not None and not self.mlflow:
            raise ValueError(
                f"tracking.register: {self.registered!r} given with tracking.mlflow: false; the registry is MLflow's, switch it on"
            )
        return self
