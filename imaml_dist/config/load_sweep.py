"""A sweep's YAML and `--set a.b=c` -> a checked `Sweep`, every corner of whose space is a configuration that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imaml_dist.config.load import assign, build_with, parse_override, read_mapping, sentences
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.config.sweep import SpaceOfField, SweepConfig
from imaml_dist.config.yaml_text import dump_yaml
from imaml_dist.errors import ConfigError

DECIDED = {
    "validate.tasks": "validation.tasks",
    "validate.manifest": "the sweep, which freezes the tasks that all trials are measured on",
}
"""Fields that the sweep decides, and by what."""

COMMON = {
    "name": "the sweep, which names trials by number",
    "evaluate": "the base: the best trial alone is tested",
    "tracking": "the base",
    "run.backend": "the base",
    "run.device": "the base",
    "data.url": "the base, for all trials are measured on the same tasks",
    "data.way": "the base, for all trials are measured on the same tasks",
}
"""Fields that are the same for all trials."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for.

    Attributes:
        config: every field of it; `base` holds what the file said.
        where: name of the file, for messages.
    """

    config: SweepConfig
    where: str

    def base(self) -> ExperimentConfig:
        """The base with the sweep's own fixed fields and budget, as yet without values of a trial."""
        return self.experiment({}, {})

    def resolved(self) -> dict[str, Any]:
        """Every field of the sweep, with the base as all trials have it; a sweep file that says the same."""
        whole = self.config.model_dump()
        return {**whole, "base": self.base().model_dump(by_alias=True), "set": {}}

    def experiment(self, values: dict[str, Any], decided: dict[str, Any]) -> ExperimentConfig:
        """The configuration of a trial.

        Args:
            values: of the fields of the space.
            decided: other fields, by the sweep itself.

        Raises:
            ConfigError: it is none; one sentence.
        """
        budget = self.config.budget
        limits = {"run.steps": budget.steps, "run.max_seconds": budget.seconds}
        fields = self.config.set | {f: v for f, v in limits.items() if v is not None} | values | decided
        assert isinstance(self.config.base, dict)
        spoken = ", ".join(f"{field}={value}" for field, value in values.items())
        where = f"{self.where} at {spoken}" if values else self.where
        try:
            return build_with(self.config.base, list(fields.items()), where)
        except ConfigError as error:
            raise ConfigError(str(error).splitlines()[0]) from error


def sweep_yaml(sweep: Sweep) -> str:
    """The resolved sweep, every field written out."""
    return dump_yaml(sweep.resolved())


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file, and check it as far as that can be done without data and without drawing trials.

    `--set base.FIELD=...` sets a field of the base for all trials, as `set` of the file does, over which it wins;
    `--set space.FIELD=...` and `--set space.FIELD.low=...` reach into the space of a field.

    Raises:
        ConfigError: a field of the sweep or of the base is unknown, missing, of the wrong type or out of range, or two
            contradict each other.
    """
    raw = read_mapping(path)
    for override in overrides:
        raw = _overridden(raw, override)
    if isinstance(raw.get("base"), str):
        raw = {**raw, "base": read_mapping(path.parent / raw["base"])}
    _check_space(raw.get("space"), str(path))
    try:
        config = SweepConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(sentences(error, raw, str(path), SweepConfig).splitlines()[0]) from error
    sweep = Sweep(config, str(path))
    sweep.base()
    _check_fields(config, str(path))
    return sweep


def _overridden(raw: dict[str, Any], override: str) -> dict[str, Any]:
    dotted, value = parse_override(override)
    section, _, field = dotted.partition(".")
    section = "set" if section == "base" and field else section
    if section not in ("space", "set") or not field:
        return assign(raw, dotted.split("."), value, dotted)
    holder = raw.get(section) or {}
    if not isinstance(holder, dict):
        raise ConfigError(f"--set {override}: {section!r} is the value {holder!r}, not a section; mend the file")
    known = next((key for key in holder if section == "space" and field.startswith(f"{key}.")), None)
    path = [field] if known is None else [known, *field.removeprefix(f"{known}.").split(".")]
    return {**raw, section: assign(holder, path, value, dotted)}


def _check_space(space: Any, where: str) -> None:
    """Each field's space by itself, for clearer words."""
    for field, given in space.items() if isinstance(space, dict) else ():
        raw = {"space": given}
        try:
            SpaceOfField.model_validate(raw)
        except ValidationError as error:
            said = sentences(error, raw, where, SpaceOfField).splitlines()[0]
            raise ConfigError(said.replace(f"{where}: space", f"{where}: space of {field}", 1)) from error


def _check_fields(config: SweepConfig, where: str) -> None:
    """Nothing is decided twice."""
    decided = dict(DECIDED)
    decided |= {"run.steps": "budget.steps"} if config.budget.steps is not None else {}
    decided |= {"run.max_seconds": "budget.seconds"} if config.budget.seconds is not None else {}
    for section, taken in (("space", decided | COMMON), ("set", decided)):
        for field in getattr(config, section):
            for other, by in taken.items():
                if _overlap(field, other):
                    raise ConfigError(f"{where}: {section}.{field}: {other} is decided by {by}; remove it")
    fields = [*config.space, *config.set]
    for number, field in enumerate(fields):
        for other in fields[:number]:
            if _overlap(field, other):
                twice = f"{field} stands in both space and set" if field == other else f"{field} and {other} overlap"
                raise ConfigError(f"{where}: {twice}, so that one would undo the other; remove one of them")


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
