"""YAML and `--set a.b=c` -> a checked `ExperimentConfig`, with errors that mend themselves."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from imaml_dist.config.model import UserModelConfig
from imaml_dist.config.presets import PRESET_FIELDS
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ConfigError

_MAX_BYTES = 1 << 20

_SOLVE = ("lbfgs", "newton_cg")
"""Inner solvers that make sense with a proximal term alone."""


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
    for override in overrides:
        dotted, value = parse_override(override)
        raw = assign(_with_strength_section(raw, dotted), dotted.split("."), value, dotted)
    _drop_what_no_longer_applies(raw, {o.partition("=")[0] for o in overrides})
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
    return yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Every field under its dotted path, as `--set` would name it."""
    return flat(config.model_dump(by_alias=True))


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's values under their dotted paths."""
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= flat(below, f"{prefix}{key}.") if isinstance(below, dict) else {f"{prefix}{key}": below}
    return found


def parse_yaml(text: str, where: str) -> Any:
    """A YAML value, without aliases and duplicate keys, with YAML 1.2's numbers.

    Raises:
        ConfigError: it is none.
    """
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{where}{line} is not valid YAML: {getattr(error, 'problem', None) or type(error).__name__}"
        ) from error


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


def _drop_what_no_longer_applies(raw: dict[str, Any], overridden: set[str]) -> None:
    """Drop what the file says for another `kind` or `preset` than the one chosen by an override."""
    if "algorithm.preset" in overridden:
        for dotted in PRESET_FIELDS:
            section, _, key = dotted.partition(".")
            if isinstance(raw.get(section), dict) and not any(o.startswith(dotted) for o in overridden):
                raw[section] = {name: value for name, value in raw[section].items() if name != key}
    switched = {dotted.removesuffix(".kind") for dotted in overridden if dotted.endswith(".kind")}
    for path in ("algorithm", "algorithm.inner", "algorithm.solver", "model"):
        outer, _, inner = path.partition(".")
        holder: Any = raw.get(outer) if inner else raw
        fields_given = holder.get(inner or outer) if isinstance(holder, dict) else None
        if isinstance(fields_given, dict) and any(path == s or path.startswith(s + ".") for s in switched):
            fields = _fields_of_kind(path, raw)
            if path == "algorithm.inner" and path in switched:
                fields = {"kind"}  # another inner solver's rate and steps mean something else
            elif path == "algorithm.inner" and path not in overridden and fields_given.get("kind") in _SOLVE:
                fields = set()  # another algorithm's inner loop is descent, with numbers of its own
            given = {name for name in fields_given if any(o.startswith(f"{path}.{name}") for o in overridden)}
            holder[inner or outer] = {
                n: v for n, v in fields_given.items() if fields is None or n in fields or n in given
            }


def _fields_of_kind(path: str, raw: dict[str, Any]) -> set[str] | None:
    """The fields that a section of the chosen kind has; None where the kind is unknown, or a user's own."""
    models: list[type[BaseModel]] = [ExperimentConfig]
    section: Any = raw
    for key in path.split("."):
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
