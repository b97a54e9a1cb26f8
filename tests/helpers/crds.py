"""Whether a manifest of KubeRay's kinds is valid by its resource definition, with unknown fields refused."""

import functools
import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

FILES = {
    "RayCluster": "ray.io_rayclusters.yaml.gz",
    "RayJob": "ray.io_rayjobs.yaml.gz",
    "RayService": "ray.io_rayservices.yaml.gz",
    "RayCronJob": "ray.io_raycronjobs.yaml.gz",
}


def violations(document: dict[str, Any]) -> list[str]:
    """What the schema does not allow: path and reason. Skips the test where the definitions are absent."""
    _, _, version = document["apiVersion"].partition("/")
    found = validator(document["kind"], version).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


@functools.cache
def validator(kind: str, version: str) -> Draft202012Validator:
    """Of one kind. Reading a definition takes half a second."""
    folder = os.environ.get("IMAML_CRDS")
    if folder is None:
        pytest.skip("KubeRay's resource definitions are not here; IMAML_CRDS names their folder")
    with gzip.open(Path(folder) / FILES[kind]) as packed:
        definition = yaml.load(packed, Loader=yaml.CSafeLoader)
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(closed)


def _closed(schema: Any) -> Any:
    """OpenAPI's schema as JSON Schema, with every object closed that lists its properties."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: value if key in ("enum", "default", "required") else _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: _closed(below) for name, below in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string") is True:
        made["type"] = ["integer", "string"]
    if schema.get("nullable") is True:
        made["type"] = [made["type"], "null"] if isinstance(made.get("type"), str) else made.get("type")
    return made
