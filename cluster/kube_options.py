"""What a user may say about how a run is placed on Kubernetes: every field with its range and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.resources import quantity
from cluster.runtime_env import check_variable
from imaml_dist.errors import ConfigError, InputError

LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""A DNS-1123 label, which names of namespaces, Secrets and service accounts are."""

_MAX_BYTES = 1 << 18


class KubeOptions(BaseModel):
    """Frozen; unknown fields are refused. No field holds a secret: `secrets` says where in the cluster one lies."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    image: str = Field(pattern=r"^[a-z0-9][a-zA-Z0-9._/:-]*(@sha256:[0-9a-f]{64})?$")
    """With a tag that is not `latest`, or a digest: all pods of a run, and of its resumption, must run the same."""
    namespace: str = Field("imaml", pattern=LABEL)
    service_account: str = Field("imaml-ray", pattern=LABEL)
    """Of all pods, but not of the head of an elastic run: KubeRay gives that one an account of its own for its autoscaler."""
    workers_per_pod: int = Field(1, ge=1, le=64)
    """Best as many as a node has GPUs: they share its cache of data."""
    memory: str = "6Gi"
    """For each worker."""
    shm: str = "1Gi"
    """Of each pod's /dev/shm, on top of that: Ray's object store and nccl are there."""
    cache: str = "20Gi"
    """Of each pod's disk, for data and compiled kernels."""
    head_cpus: int = Field(2, ge=1, le=64)
    """The command itself runs on the head; workers never do."""
    head_memory: str = "8Gi"
    env: dict[str, str] = {}
    """Variables of all pods that may be written down, such as AWS_ENDPOINT_URL_S3 and MLFLOW_TRACKING_URI."""
    secrets: dict[str, str] = {
        "AWS_ACCESS_KEY_ID": "imaml-s3/AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "imaml-s3/AWS_SECRET_ACCESS_KEY",
    }
    """Variables whose values lie in a Secret of the namespace: `secret/key`. Empty with an identity of the workload."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that workers may be placed on."""
    tolerations: list[dict[str, str]] = []
    """More than that of GPU nodes, for example of preemptible ones."""
    retries: int = Field(3, ge=0, le=100)
    """New clusters after the first, each of which resumes from the newest checkpoint that verifies."""
    start_seconds: int = Field(1800, ge=60, le=604800)
    """How long a run may wait for nodes and images."""
    max_seconds: int | None = Field(None, ge=60)
    """Of the whole job, retries included."""
    keep_seconds: int = Field(600, ge=0, le=604800)
    """How long the pods of a finished run stay, for their logs."""
    keep_failed_seconds: int = Field(3600, ge=0, le=604800)
    """The same of a failed one."""
    queue: str | None = Field(None, pattern=LABEL)
    """A LocalQueue of Kueue, which then decides when the run begins."""

    @field_validator("memory", "shm", "cache", "head_memory")
    @classmethod
    def _is_a_quantity(cls, given: str) -> str:
        try:
            enough = quantity(given, "it") >= 2**28
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if not enough:
            raise ValueError(f"{given!r} given, must be at least 256Mi")
        return given

    @field_validator("image")
    @classmethod
    def _says_which(cls, given: str) -> str:
        tag = given.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if "@" not in given and tag in ("", "latest"):
            raise ValueError(
                f"{given!r} given, must have a tag other than latest, or a digest, since another image resumes no run"
            )
        return given

    @field_validator("secrets")
    @classmethod
    def _says_where(cls, given: dict[str, str]) -> dict[str, str]:
        for name, place in given.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(
                r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+", place
            ):
                # The value is not shown: it may be a secret that was written here by mistake.
                raise ValueError(
                    f"{name} does not name a Secret; write where its value lies, as `{name}: secret/key`, never the value"
                )
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> KubeOptions:
        for name, value in self.env.items():
            if name in self.secrets:
                raise ValueError(f"env.{name}: stands under `secrets` as well; remove one of the two")
            try:
                check_variable(name, value, "env")
            except InputError as error:
                raise ValueError(str(error)) from error
        if quantity(self.shm, "shm") > quantity(self.head_memory, "head_memory") / 2:
            raise ValueError(f"shm: {self.shm} given, may be half of head_memory = {self.head_memory} at most")
        return self


def load_kube_options(path: Path | None, given: dict[str, Any]) -> KubeOptions:
    """Read options from a YAML file, and what is given beside it.

    Args:
        path: of the file; None if there is none.
        given: fields that win over the file's.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing or out of its range.
    """
    raw: Any = {}
    where = str(path or "options of Kubernetes")
    if path is not None:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ConfigError(
                f"{path} is no file of options of at most {_MAX_BYTES} bytes; docs/kubernetes.md has the fields"
            )
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            at = "" if line is None else f" line {line + 1}"
            raise ConfigError(f"{path}{at} is not valid YAML; mend it") from error
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds {type(raw).__name__}, options are a mapping such as `namespace: imaml`")
    try:
        return KubeOptions.model_validate({**raw, **given})
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(e, where) for e in error.errors())) from error


def _sentence(error: Any, where: str) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        return f"{where}: {path + ': ' if path else ''}{error['ctx']['error']}"
    if error["type"] == "missing":
        return f"{where}: {path} is missing; add it, for example --{path} registry.example.org/imaml:1.0"
    if error["type"] == "extra_forbidden":
        return f"{where}: {path} is not a known field; there are {', '.join(KubeOptions.model_fields)}"
    # Under `secrets` no value is repeated.
    shown = "" if path.startswith("secrets") else f"{repr(error['input'])[:80]} given, "
    return f"{where}: {path}: {shown}{error['msg'].replace('Input should', 'should')}"
