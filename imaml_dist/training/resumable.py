"""What a resumed run may change, and what it may not."""

from __future__ import annotations

import json
from typing import Any

from imaml_dist.config.load import flatten
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ConfigError

RESUMABLE = (
    "run.steps",
    "run.max_seconds",
    "run.workers",
    "run.gpus_per_worker",
    "run.backend",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.keep",
    "run.give_up_after",
    "run.profile",
    "run.compare_every",
    "run.deal",
    "run.heartbeat_timeout",
    "run.collective_timeout",
    "validate.every",
    "validate.patience",
    "evaluate",
    "storage",
    "tracking",
)
"""Fields, or whole sections, that a resumed run may change: none of them changes what a meta-step computes.

`run.steps` does under a schedule other than constant, and is refused then."""

PLACES = ("data.url", "warm_start.path", "validate.manifest")
"""Fields that a worker elsewhere has under other values; what lies there is compared by its content."""


def fixed_fields(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that a resumed run may not change, in JSON's types, but for places, which have many names."""
    fixed = {field: value for field, value in flatten(config).items() if not _resumable(field) and field not in PLACES}
    found: dict[str, Any] = json.loads(json.dumps(fixed))
    return found


def _resumable(field: str) -> bool:
    return any(field == r or field.startswith(r + ".") for r in RESUMABLE)


def check_resumable(old: ExperimentConfig, new: ExperimentConfig, where: str) -> None:
    """Compare two configurations field by field.

    Raises:
        ConfigError: they differ in a field that may not change; the message names the first one.
    """
    before, after = flatten(old), flatten(new)
    if old.run.steps != new.run.steps and new.outer.schedule != "constant":
        raise ConfigError(
            f"run.steps: {new.run.steps} given, but the run in {where} was begun with {old.run.steps}, and with outer.schedule "
            f"{new.outer.schedule!r} every step's rate depends on it; restore the old value, or start over with --fresh"
        )
    # A kind first: the fields below it differ because of it.
    for field in sorted(before.keys() | after.keys(), key=lambda name: (not name.endswith(".kind"), name)):
        if before.get(field) != after.get(field) and not _resumable(field):
            raise ConfigError(
                f"{field}: {after.get(field)!r} given, but the run in {where} was begun with {before.get(field)!r}, and a resumed run "
                f"may only change {', '.join(RESUMABLE)}; restore the old value, choose another --run-dir, or start over with --fresh"
            )
