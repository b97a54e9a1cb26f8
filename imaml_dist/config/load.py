"""YAML and `--set a.b=c` -> a checked `ExperimentConfig`, with errors that mend themselves."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from imaml_dist.config.model import UserModelConfig
from imaml_dist.config.presets import PRESET_FIELDS
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.config.yaml_text import dump_yaml, parse_yaml
from imaml_dist.errors import ConfigError

_MAX_BYTES = 1 << 20

_SOLVE = ("lbfgs", "newton_cg")
"""Inner solvers that make sense with a proximal term alone."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a configuration file and apply `a.b=value` overrides, whose values are YAML.

    An override of a section's `kind` drops the fields of the file that the new kind does not have (of `algorithm.kind` an inner solver
    such as L-BFGS too, which is for a proximal term), and one of
    `algorithm.preset` those that the preset decides, so that either is one switch; fields set by an override are never
    dropped.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown, missing, of the wrong type or out of range.
            The message names the dotted path, the value, what is allowed and the nearest valid key.
    """
    return build_config(read_mapping(path), overrides, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """What a configuration file says, unchecked.

    Raises:
        ConfigError: the file is missing, too large, not YAML, or no mapping.
    """
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}; shipped ones lie in pipelines/configs/")
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, too large for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error})") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, a configuration is a mapping such as `name: my-run`")
    return raw


def build_config(raw: dict[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> ExperimentConfig:
    """As `load_config`, from a mapping."""
    return build_with(raw, [parse_override(override) for override in overrides], where)


def build_with(raw: dict[str, Any], fields: Sequence[tuple[str, Any]], where: str) -> ExperimentConfig:
    """As `build_config`, with each override as its dotted field and value; `raw` and the values stay as they are."""
    overridden = {dotted for dotted, _ in fields}
    if "algorithm.preset" in overridden:
        raw = _without_preset_fields(raw)
    for dotted, value in fields:
        raw = assign(_with_strength_section(raw, dotted), dotted.split("."), value, dotted)
    raw = _without_fields_of_other_kinds(raw, overridden)
    try:
        return ExperimentConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(sentences(error, raw, where)) from error


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted field and the value of `section.field=value`.

    Raises:
        ConfigError: it is not of that form, or the value is not YAML.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")) or dotted.count(".") > 8:
        raise ConfigError(f"--set {override}: expected section.field=value, for example --set run.steps=100")
    return dotted, parse_yaml(text, f"--set {override}")


def sentences(error: ValidationError, raw: Any, where: str, root: type[BaseModel] = ExperimentConfig) -> str:
    """What pydantic found, a line each, in the words of the user's file.

    Args:
        error: of validating.
        raw: what was validated.
        where: it stands, the beginning of each line.
        root: the model it was validated as.
    """
    return "\n".join(f"{where}: {_sentence(e, raw, root)}" for e in error.errors())


def to_yaml(config: ExperimentConfig) -> str:
    """The resolved configuration, every field written out."""
    return dump_yaml(config.model_dump(by_alias=True))


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every field under its dotted path, as `--set` would name it."""
    return flat(config.model_dump(by_alias=True))


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's values under their dotted paths."""
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= flat(below, f"{prefix}{key}.") if isinstance(below, dict) else {f"{prefix}{key}": below}
    return found


def assign(raw: dict[str, Any], path: list[str], value: Any, dotted: str) -> dict[str, Any]:
    """A copy in which the field at `path` has that value.

    Raises:
        ConfigError: what lies on the way is no section.
    """
    head, *rest = path
    if not rest:
        return {**raw, head: value}
    below = raw.get(head, {})
    if below is None:
        below = {}
    if not isinstance(below, dict):
        raise ConfigError(
            f"--set {dotted}=...: {head!r} is the value {below!r}, not a section, so it has no field {rest[0]!r}"
        )
    return {**raw, head: assign(below, rest, value, dotted)}


def _with_strength_section(raw: dict[str, Any], dotted: str) -> dict[str, Any]:
    """`algorithm.lam: 0.1` as `{init: 0.1}` where an override reaches into it."""
    algorithm = raw.get("algorithm")
    lam = algorithm.get("lam") if isinstance(algorithm, dict) else None
    if dotted.startswith("algorithm.lam.") and isinstance(algorithm, dict) and isinstance(lam, (int, float)):
        return {**raw, "algorithm": {**algorithm, "lam": {"init": lam}}}
    return raw


def _without_preset_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """A copy without what a preset decides."""
    for dotted in PRESET_FIELDS:
        section, _, key = dotted.partition(".")
        if isinstance(raw.get(section), dict):
            raw = {**raw, section: {name: value for name, value in raw[section].items() if name != key}}
    return raw


def _without_fields_of_other_kinds(raw: dict[str, Any], overridden: set[str]) -> dict[str, Any]:
    """A copy without what the file says for another `kind` than the one chosen by an override."""
    switched = {dotted.removesuffix(".kind") for dotted in overridden if dotted.endswith(".kind")}
    for path in ("algorithm", "algorithm.inner", "algorithm.solver", "model"):
        outer, _, inner = path.partition(".")
        holder: Any = raw.get(outer) if inner else raw
        fields_given = holder.get(inner or outer) if isinstance(holder, dict) else None
        if isinstance(fields_given, dict) and any(_is_within(path, s) for s in switched):
            fields = _fields_of_kind(path, raw)
            if path == "algorithm.inner" and path in switched:
                fields = {"kind"}  # another inner solver's rate and steps mean something else
            elif path == "algorithm.inner" and path not in overridden and fields_given.get("kind") in _SOLVE:
                fields = set()  # another algorithm's inner loop is descent, with numbers of its own
            given = {name for name in fields_given if any(_is_within(o, f"{path}.{name}") for o in overridden)}
            kept = {n: v for n, v in fields_given.items() if fields is None or n in fields or n in given}
            raw = assign(raw, path.split("."), kept, path)
    return raw


def _is_within(dotted: str, section: str) -> bool:
    return dotted == section or dotted.startswith(f"{section}.")


def _fields_of_kind(path: str, raw: dict[str, Any]) -> set[str] | None:
    """The fields that a section of the chosen kind has; None where the kind is unknown, a user's own, or has no such section."""
    models: list[type[BaseModel]] = [ExperimentConfig]
    section: Any = raw
    for key in path.split("."):
        if key not in models[0].model_fields:
            return None  # it will be refused as a whole
        default = models[0].model_fields[key].default
        section = section.get(key)
        kind = section.get("kind", default.kind) if isinstance(section, dict) else default.kind
        models = [below for below in _models_of(models[0], key) if below.model_fields["kind"].default == kind]
        if not models:
            return None
    return set(models[0].model_fields)


def _sentence(error: Any, raw: Any, root: type[BaseModel]) -> str:
    """One pydantic error as one sentence."""
    path, section = _dotted(error["loc"], raw)
    kind, given = error["type"], error.get("input")
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return path + text if text.startswith(".") else text  # of a section that stands in several places
    if kind == "missing":
        return f"{path}: is missing; add it, for example `{path}: ...`"
    if kind == "extra_forbidden":
        return f"{path}: is not a known field; {_nearest(path, section, root)}"
    allowed = str(error["msg"]).replace("Input should", "should")
    if kind == "kind" and isinstance(given, dict):
        path, given = f"{path}.kind", given.get("kind")
    elif kind == "kind":
        allowed = allowed.replace("should be", "should be a mapping whose kind is")
    elif kind in ("model_type", "float_type", "int_type") and (fields := _fields_at(path, None, root)):
        number = {"float_type": "a number, or ", "int_type": "an integer, or "}.get(kind, "")
        allowed = f"should be {number}a mapping of {', '.join(fields)}"
    shown = "null" if given is None else repr(given)
    return f"{path}: {shown[:80]} given, {allowed}"


def _dotted(location: Sequence[Any], raw: Any) -> tuple[str, Any]:
    """The path as the user writes it: without the tags that pydantic puts between a section and its fields."""
    parts: list[str] = []
    value, section = raw, raw
    for index, part in enumerate(location):
        # The tag of a union of sections, or of a number and a section.
        inside = isinstance(value, dict) and part not in value and index < len(location) - 1
        if inside or (parts and not isinstance(value, (dict, list))) or (isinstance(value, list) and part == "number"):
            continue
        parts.append(str(part))
        section = value
        value = value.get(part) if isinstance(value, dict) else None
    return ".".join(parts), section


def _nearest(path: str, section: Any, root: type[BaseModel]) -> str:
    every = [p for p in _all_paths(root) if p != path]
    parent, _, key = path.rpartition(".")
    kind = section.get("kind") if isinstance(section, dict) else None
    siblings = _fields_at(parent, kind, root)
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {parent + '.' if parent else ''}{close[0]}?"
    elsewhere = [p for p in every if p.rpartition(".")[2] == key]
    hint = f"did you mean {elsewhere[0]}? Otherwise " if elsewhere else ""
    return f"{hint}{parent or 'the top level'} takes {', '.join(siblings)}"


def _fields_at(parent: str, kind: Any, root: type[BaseModel]) -> list[str]:
    models: list[type[BaseModel]] = [root]
    for part in parent.split(".") if parent else []:
        models = [m for model in models for m in _models_of(model, part)]
    if kind is not None:
        models = [m for m in models if m.model_fields["kind"].default == kind] or models
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        paths.append(dotted)
        for below in _models_of(model, field.alias or name):
            paths += _all_paths(below, f"{dotted}.")
    return list(dict.fromkeys(paths))


def _models_of(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    field = next((f for name, f in model.model_fields.items() if (f.alias or name) == key), None)
    found: list[type[BaseModel]] = []
    pending: list[Any] = [] if field is None else [field.annotation]
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel) and candidate is not UserModelConfig:
            found.append(candidate)
        else:
            pending.extend(get_args(candidate))
    return found
