"""A run as a RayJob of KubeRay: what it needs, its command and its configuration -> a manifest.

One object holds all: the configuration is an annotation of the head, which finds it as a file (downward API). The command is
that of every other place, `imaml train ... --run-dir s3://...`; a retry is a new cluster that runs it again, and so resumes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from shlex import join
from typing import Any

import yaml

from cluster.jobs import STOP_S
from cluster.kube_options import KubeOptions
from cluster.resources import Needs, quantity
from imaml_dist.errors import InputError

CONFIG_FOLDER = "/etc/imaml"
CONFIG_FILE = f"{CONFIG_FOLDER}/config.yaml"
"""Where the head finds the configuration."""

CONFIG_KEY = "imaml/config"
"""Annotation of the head that holds it."""

CONFIG_BYTES = 1 << 17
"""Kubernetes takes 256 KiB of annotations."""

CACHE_FOLDER = "/var/cache/imaml"

NAME_LENGTH = 47
"""KubeRay appends to the name of a RayJob what makes the names of its pods."""

KEEP_RECORD_S = 7 * 24 * 3600
"""How long the RayJob object itself stays after success."""

POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Args:
        name: of the experiment; the RayJob's is made of it.
        command: with its arguments; it finds the configuration at `CONFIG_FILE`.
        config: text of the configuration.
        needs: of all workers; without any, the head alone does the work.
    """

    name: str
    command: Sequence[str]
    config: str
    needs: Needs


def job_name(name: str) -> str:
    """The RayJob of an experiment: the same for the same name, another for another one.

    A name that must be changed to be a DNS-1035 label gets six digits of its own hash.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}".rstrip("-")
    if label == name and len(label) <= NAME_LENGTH:
        return label
    return f"{label[: NAME_LENGTH - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def rayjob(run: Run, options: KubeOptions) -> dict[str, Any]:
    """The manifest.

    Raises:
        InputError: run and options do not go together.
    """
    fewest, most = _pods(run.needs, options)
    elastic = fewest != most
    if len(run.config.encode()) > CONFIG_BYTES:
        raise InputError(
            f"the configuration has more than {CONFIG_BYTES} bytes, too many for an annotation; shorten it"
        )
    if options.queue is not None and elastic:
        raise InputError(
            f"run.workers: {run.needs.fewest} to {run.needs.most} given, but Kueue admits runs of one size; give a number, or no queue"
        )
    # Not app.kubernetes.io/name: KubeRay's service finds the head by that one.
    labels = {"app.kubernetes.io/part-of": "imaml", "app.kubernetes.io/instance": job_name(run.name)}
    queue = {} if options.queue is None else {"kueue.x-k8s.io/queue-name": options.queue}
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": elastic,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", **_object_store(options)},
            "template": _head(run, options, labels, elastic),
        },
    }
    if most:
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": fewest,
                "minReplicas": fewest,
                "maxReplicas": most,
                "rayStartParams": _object_store(options),
                "template": _worker(run.needs, options, labels),
            }
        ]
    if elastic:
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "securityContext": CONTAINER_SECURITY,  # of a container beside the head's: without, `restricted` refuses the pod
            "resources": _equal({"cpu": "500m", "memory": "1Gi"}),
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job_name(run.name), "namespace": options.namespace, "labels": {**labels, **queue}},
        "spec": {
            "submissionMode": "HTTPMode",  # others end a healthy run when a stream of logs breaks
            "entrypoint": join(run.command),
            "backoffLimit": options.retries,
            "preRunningDeadlineSeconds": options.start_seconds,
            **({} if options.max_seconds is None else {"activeDeadlineSeconds": options.max_seconds}),
            **_ending(options),
            "rayClusterSpec": cluster,
        },
    }


def to_yaml(manifest: Mapping[str, Any]) -> str:
    """As `kubectl apply -f -` takes it."""
    return yaml.dump(dict(manifest), Dumper=_Dumper, sort_keys=False, width=1000)


def _pods(needs: Needs, options: KubeOptions) -> tuple[int, int]:
    each = options.workers_per_pod
    for workers in (needs.fewest, needs.most):
        if workers % each:
            raise InputError(
                f"workers_per_pod: {each} given, but run.workers = {workers} is not a multiple of it; change one of the two"
            )
    return needs.fewest // each, needs.most // each


def _ending(options: KubeOptions) -> dict[str, Any]:
    """What is removed when. Kueue suspends, which KubeRay allows with `shutdownAfterJobFinishes` only, which excludes rules."""
    if options.queue is not None:
        return {"suspend": True, "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": options.keep_seconds}
    rules = [
        ("DeleteCluster", {"jobStatus": "SUCCEEDED", "ttlSeconds": options.keep_seconds}),
        ("DeleteSelf", {"jobStatus": "SUCCEEDED", "ttlSeconds": KEEP_RECORD_S + options.keep_seconds}),
        ("DeleteCluster", {"jobStatus": "FAILED", "ttlSeconds": options.keep_failed_seconds}),
        ("DeleteCluster", {"jobDeploymentStatus": "Failed", "ttlSeconds": options.keep_failed_seconds}),
    ]
    return {"deletionStrategy": {"deletionRules": [{"policy": p, "condition": c} for p, c in rules]}}


def _head(run: Run, options: KubeOptions, labels: Mapping[str, str], elastic: bool) -> dict[str, Any]:
    head = _pod("ray-head", options, {"cpu": str(options.head_cpus), "memory": options.head_memory})
    head["volumes"].append({"name": "config", "downwardAPI": {"items": [_CONFIG_ITEM]}})
    head["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    head["containers"][0]["ports"] = [
        {"name": "gcs", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
    ]
    stop = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_S)}
    head["containers"][0]["env"] = [stop, *head["containers"][0]["env"]]
    if not elastic:  # the autoscaler talks to Kubernetes, by an account that KubeRay makes for it
        head |= _account(options)
    annotated = {CONFIG_KEY: run.config}
    return {
        "metadata": {"labels": {**labels, "app.kubernetes.io/component": "head"}, "annotations": annotated},
        "spec": head,
    }


def _worker(needs: Needs, options: KubeOptions, labels: Mapping[str, str]) -> dict[str, Any]:
    each = options.workers_per_pod
    memory = each * quantity(options.memory, "memory") + quantity(options.shm, "shm")
    resources = {"cpu": str(math.ceil(each * needs.cpus)), "memory": f"{math.ceil(memory / 2**20)}Mi"}
    tolerations = list(options.tolerations)
    if needs.gpus:
        resources["nvidia.com/gpu"] = str(math.ceil(each * needs.gpus))
        tolerations.insert(0, GPU_TOLERATION)
    pod = _pod("ray-worker", options, resources) | _account(options)
    pod["terminationGracePeriodSeconds"] = 120  # for the step that is under way, and its checkpoint
    if tolerations:
        pod["tolerations"] = tolerations
    if options.node_selector:
        pod["nodeSelector"] = options.node_selector
    return {"metadata": {"labels": {**labels, "app.kubernetes.io/component": "worker"}}, "spec": pod}


def _pod(name: str, options: KubeOptions, resources: Mapping[str, str]) -> dict[str, Any]:
    mounts = {"shm": "/dev/shm", "cache": CACHE_FOLDER}  # noqa: S108 - where Ray has its object store
    return {
        "securityContext": POD_SECURITY,
        "containers": [
            {
                "name": name,
                "image": options.image,
                "env": _environment(options),
                "resources": _equal(resources),
                "securityContext": CONTAINER_SECURITY,
                "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
            {"name": "cache", "emptyDir": {"sizeLimit": options.cache}},
        ],
    }


def _object_store(options: KubeOptions) -> dict[str, str]:
    """Half of /dev/shm; the rest is for nccl. Of its own accord Ray takes a share of the memory, and where that is more, a disk."""
    return {"object-store-memory": str(int(quantity(options.shm, "shm") / 2))}


def _account(options: KubeOptions) -> dict[str, Any]:
    return {"serviceAccountName": options.service_account, "automountServiceAccountToken": False}


def _environment(options: KubeOptions) -> list[dict[str, Any]]:
    plain = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "IMAML_CACHE": f"{CACHE_FOLDER}/data",
        "IMAML_KERNELS": f"{CACHE_FOLDER}/kernels",
        **options.env,
    }
    kept = {name: place.partition("/") for name, place in options.secrets.items()}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *({"name": n, "valueFrom": {"secretKeyRef": {"name": s, "key": k}}} for n, (s, _, k) in kept.items()),
    ]


def _equal(resources: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Requests and limits alike: the pod is the last to be evicted, and Ray is told of what there really is."""
    return {"requests": dict(resources), "limits": dict(resources)}


_CONFIG_ITEM = {"path": "config.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG_KEY}']"}}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; no anchors, which a reader would have to resolve."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
