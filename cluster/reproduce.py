"""What KubeRay makes of a manifest: the `ray start` command and the environment of head and workers.

A reading of KubeRay 1.7, so that a cluster can be started on one machine just as its manifests say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.resources import quantity
from imaml_dist.errors import InputError

GCS_PORT = "6379"
WITH_ARGUMENT = ("log-color", "include-dashboard")
"""Options that take `true` and `false` as words; any other one stands for itself, or is left out."""


@dataclass(frozen=True)
class RayStart:
    """One kind of pod as KubeRay starts it.

    Args:
        group: of workers; `head` for the head.
        pods: how many at the beginning.
        command: `ray start ...`.
        environment: of the container, without secrets.
        secrets: variable -> `secret/key`, which Kubernetes puts in.
    """

    group: str
    pods: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict)


def ray_starts(manifest: Mapping[str, Any], head: str, cluster_name: str) -> list[RayStart]:
    """The commands of a RayJob or a RayCluster, the head's first.

    Args:
        manifest: as it was rendered.
        head: name or address under which workers find the head.
        cluster_name: which KubeRay makes up for a RayJob; the operator's own Secret with the token has it as well.

    Raises:
        InputError: the manifest brings no cluster.
    """
    spec = manifest.get("spec", {})
    cluster = spec if manifest.get("kind") == "RayCluster" else spec.get("rayClusterSpec")
    if not cluster or "headGroupSpec" not in cluster:
        raise InputError(
            f"{manifest.get('kind')}: brings no cluster; give a RayCluster, or a RayJob with rayClusterSpec"
        )
    port = str(cluster["headGroupSpec"].get("rayStartParams", {}).get("port", GCS_PORT))
    return [
        _head(cluster, port, cluster_name),
        *(_workers(cluster, group, f"{head}:{port}", cluster_name) for group in cluster.get("workerGroupSpecs", [])),
    ]


def _head(cluster: Mapping[str, Any], port: str, cluster_name: str) -> RayStart:
    group = cluster["headGroupSpec"]
    container = group["template"]["spec"]["containers"][0]
    parameters = {"dashboard-host": "0.0.0.0", **_parameters(group, container)}  # noqa: S104 - which KubeRay does
    if cluster.get("enableInTreeAutoscaling"):
        parameters["no-monitor"] = "true"  # the autoscaler has a container of its own
    command = ("ray", "start", "--head", *_written(parameters))
    environment, secrets = _environment(container, cluster, cluster_name, f"127.0.0.1:{port}")
    environment["RAY_NODE_TYPE_NAME"] = "headgroup"
    if cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version", "v2") == "v2":
        environment["RAY_enable_autoscaler_v2"] = "true"
    return RayStart("head", 1, command, environment, secrets)


def _workers(cluster: Mapping[str, Any], group: Mapping[str, Any], address: str, cluster_name: str) -> RayStart:
    container = group["template"]["spec"]["containers"][0]
    command = ("ray", "start", *_written({"address": address, **_parameters(group, container)}))
    environment, secrets = _environment(container, cluster, cluster_name, address)
    environment["FQ_RAY_IP"] = address.rpartition(":")[0]
    return RayStart(
        group["groupName"], group.get("replicas", group.get("minReplicas", 1)), command, environment, secrets
    )


def _parameters(group: Mapping[str, Any], container: Mapping[str, Any]) -> dict[str, str]:
    """Those of the manifest, those of the container's limits, and KubeRay's own."""
    limits, requests = (container.get("resources", {}).get(kind, {}) for kind in ("limits", "requests"))
    parameters = {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
    if "cpu" in limits or "cpu" in requests:
        parameters["num-cpus"] = str(math.ceil(quantity(limits.get("cpu", requests.get("cpu")), "resources.cpu")))
    if "memory" in limits:
        parameters["memory"] = str(int(quantity(limits["memory"], "limits.memory")))
    gpus = [amount for name, amount in limits.items() if name.endswith("gpu")]
    if gpus:
        parameters["num-gpus"] = str(gpus[0])
    labels = ",".join(f"{key}={value}" for key, value in sorted(group.get("labels", {}).items()))
    given = dict(group.get("rayStartParams", {})) | {"block": "true"}
    return parameters | ({"labels": labels} if labels else {}) | given


def _written(parameters: Mapping[str, str]) -> list[str]:
    words = []
    for name, value in sorted(parameters.items()):
        if value.lower() not in ("true", "false") or name in WITH_ARGUMENT:
            words.append(f"--{name}={value}")
        elif value.lower() == "true":
            words.append(f"--{name}")
    return words


def _environment(
    container: Mapping[str, Any], cluster: Mapping[str, Any], cluster_name: str, address: str
) -> tuple[dict[str, str], dict[str, str]]:
    plain: dict[str, str] = {}
    secrets: dict[str, str] = {}
    for variable in container.get("env", []):
        kept = variable.get("valueFrom", {}).get("secretKeyRef")
        if kept is not None:
            secrets[variable["name"]] = f"{kept['name']}/{kept['key']}"
        elif "value" in variable:
            plain[variable["name"]] = variable["value"]
    plain |= {
        "RAY_CLUSTER_NAME": cluster_name,
        "RAY_ADDRESS": address,
        "RAY_PORT": address.rpartition(":")[2],
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    options = cluster.get("authOptions", {})
    if options.get("mode") == "token":
        plain["RAY_AUTH_MODE"] = "token"
        secrets["RAY_AUTH_TOKEN"] = f"{options.get('secretName', cluster_name)}/auth_token"
    return plain, secrets
