"""YAML and `--set a.b=c` -> a checked `ExperimentConfig`, with errors that mend themselves."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from imaml_dist.config.schema import ExperimentConfig, UserModelConfig
from imaml_dist.errors import ConfigError

_MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (`1e-6` is one), no duplicate keys, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.MarkedYAMLError(problem=f"key {min(twice)!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Without YAML 1.1's octal 010 and sexagesimal 1:30, with 1e-6.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z"),
    list("-+.0123456789"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a configuration file and apply `a.b=value` overrides, whose values are YAML.

    An override of a section's `kind` drops the fields of the file that the new kind does not have, so that
    `--set algorithm.kind=fomaml` is one switch; fields set by an override are never dropped.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown, missing, of the wrong type or out of range.
            The message names the dotted path, the value, what is allowed and the nearest valid key.
    """
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}; shipped ones lie in pipelines/configs/")
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, too large for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error})") from error
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, a configuration is a mapping such as `name: my-run`")
    return build_config(raw, overrides, str(path))


def build_config(raw: dict[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> ExperimentConfig:
    """As `load_config`, from a mapping."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")) or dotted.count(".") > 8:
            raise ConfigError(f"--set {override}: expected section.field=value, for example --set run.steps=100")
        raw = _assign(raw, dotted.split("."), _parse(text, f"--set {override}"), dotted)
    _drop_fields_of_other_kinds(raw, {o.partition("=")[0] for o in overrides})
    try:
        return ExperimentConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_sentence(e, raw)}" for e in error.errors())) from error


def to_yaml(config: ExperimentConfig) -> str:
    """The resolved configuration, every field written out."""
    return yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every field under its dotted path, as `--set` would name it."""
    return _flat(config.model_dump(by_alias=True))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, below in value.items():
        flat |= _flat(below, f"{prefix}{key}.") if isinstance(below, dict) else {f"{prefix}{key}": below}
    return flat


def _parse(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{where}{line} is not valid YAML: {getattr(error, 'problem', None) or type(error).__name__}"
        ) from error


def _assign(raw: dict[str, Any], path: list[str], value: Any, dotted: str) -> dict[str, Any]:
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
    return {**raw, head: _assign(below, rest, value, dotted)}


def _drop_fields_of_other_kinds(raw: dict[str, Any], overridden: set[str]) -> None:
    for section in ("algorithm", "model"):
        kind = raw[section].get("kind") if isinstance(raw.get(section), dict) else None
        chosen = _kinds(section).get(kind) if isinstance(kind, str) else None
        if f"{section}.kind" in overridden and chosen is not None:
            raw[section] = {
                key: value
                for key, value in raw[section].items()
                if key in chosen.model_fields or any(o.startswith(f"{section}.{key}") for o in overridden)
            }


def _kinds(section: str) -> dict[Any, type[BaseModel]]:
    """The records a section can be, by their `kind`."""
    kinds: dict[Any, type[BaseModel]] = {}
    pending = [ExperimentConfig.model_fields[section].annotation]
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            kinds[candidate.model_fields["kind"].default] = candidate
        else:
            pending.extend(get_args(candidate))
    return kinds


def _sentence(error: Any, raw: Any) -> str:
    """One pydantic error as one sentence."""
    path, section = _dotted(error["loc"], raw)
    kind, given = error["type"], error.get("input")
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "missing":
        return f"{path}: is missing; add it, for example `{path}: ...`"
    if kind == "extra_forbidden":
        return f"{path}: is not a known field; {_nearest(path, section)}"
    if kind == "kind":
        path, given = f"{path}.kind", given.get("kind") if isinstance(given, dict) else given
    allowed = str(error["msg"]).replace("Input should", "should")
    shown = "null" if given is None else repr(given)
    return f"{path}: {shown[:80]} given, {allowed}"


def _dotted(location: Sequence[Any], raw: Any) -> tuple[str, Any]:
    """The path as the user writes it: without the tags that pydantic puts between a section and its fields."""
    parts, value, section = [], raw, raw
    for index, part in enumerate(location):
        tag = isinstance(value, dict) and part not in value and index < len(location) - 1
        if tag:
            continue
        parts.append(str(part))
        section = value
        value = value.get(part) if isinstance(value, dict) else None
    return ".".join(parts), section


def _nearest(path: str, section: Any) -> str:
    every = [p for p in _all_paths() if p != path]
    parent, _, key = path.rpartition(".")
    kind = section.get("kind") if isinstance(section, dict) else None
    siblings = _fields_at(parent, kind)
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {parent + '.' if parent else ''}{close[0]}?"
    elsewhere = [p for p in every if p.rpartition(".")[2] == key]
    hint = f"did you mean {elsewhere[0]}? Otherwise " if elsewhere else ""
    return f"{hint}{parent or 'the top level'} takes {', '.join(siblings)}"


def _fields_at(parent: str, kind: Any) -> list[str]:
    models: list[type[BaseModel]] = [ExperimentConfig]
    for part in parent.split(".") if parent else []:
        models = [m for model in models for m in _models_of(model, part)]
    if kind is not None:
        models = [m for m in models if m.model_fields["kind"].default == kind] or models
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _all_paths(model: type[BaseModel] = ExperimentConfig, prefix: str = "") -> list[str]:
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
