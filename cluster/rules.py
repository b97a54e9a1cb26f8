"""Rules of KubeRay 1.7 that the schemas of its resources do not check, each with a sentence of what is wrong, where, and what to do.

A manifest that breaks one is taken by Kubernetes and fails later, in the operator, where nobody looks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

Document = Mapping[str, Any]

KINDS = ("RayCluster", "RayJob", "RayService", "RayCronJob")

NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
RESOURCE_PARAMETERS = ("num-cpus", "num-gpus", "memory", "resources")
POLICIES = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
"""In the order in which they may come."""
TLS_VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def broken(document: Document) -> list[str]:
    """What is wrong with a manifest; nothing, if its kind is none of KubeRay's.

    Args:
        document: one that is valid by the schema of its kind.

    Returns:
        A sentence for each rule that it breaks.
    """
    if document.get("kind") not in KINDS:
        return []
    where = f"{document['kind']} {document.get('metadata', {}).get('name', '')}"
    return [f"{where}: {sentence}" for rule in RULES for sentence in rule(document)]


def name_is_short_enough(document: Document) -> Iterator[str]:
    """Names of pods and services are made of it."""
    name, most = document.get("metadata", {}).get("name", ""), NAME_LENGTHS[document["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > most:
        yield f"metadata.name: {name!r} is no DNS-1035 label of at most {most} characters; use a-z, 0-9 and -, beginning with a letter"


def submission_mode_exists(document: Document) -> Iterator[str]:
    """The schema takes any string."""
    mode = _job(document).get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"spec.submissionMode: {mode!r} is none of {', '.join(SUBMISSION_MODES)}; use HTTPMode"


def something_runs(document: Document) -> Iterator[str]:
    """A job brings a cluster or selects one, which then is not its own to retry, suspend or delete."""
    job = _job(document)
    if not job:
        return
    selector = job.get("clusterSelector")
    if not selector and "rayClusterSpec" not in job:
        yield "spec: has neither rayClusterSpec nor a clusterSelector; add the former"
    if not selector:
        return
    if not selector.get("ray.io/cluster"):
        yield "spec.clusterSelector: names no ray.io/cluster; name the cluster"
    for field in ("backoffLimit", "suspend"):
        if job.get(field):
            yield f"spec.{field}: cannot be with a clusterSelector; remove one of the two"
    if job.get("submissionMode") == "SidecarMode":
        yield "spec.submissionMode: SidecarMode cannot be with a clusterSelector; use HTTPMode"
    for rule in _deletion_rules(job):
        if rule.get("policy") in ("DeleteCluster", "DeleteWorkers"):
            yield f"spec.deletionStrategy: {rule['policy']} cannot be with a clusterSelector, whose cluster is not the job's; remove it"


def mode_allows_the_rest(document: Document) -> Iterator[str]:
    """InteractiveMode has nothing to retry; SidecarMode has no submitter."""
    job = _job(document)
    mode = job.get("submissionMode")
    if mode == "InteractiveMode" and job.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit: must be 0 in InteractiveMode; remove it"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if field in job:
                yield f"spec.{field}: cannot be in SidecarMode; remove it, or use HTTPMode"
        for path, pod in _pods(document):
            if "head" in path and pod.get("restartPolicy", "Never") != "Never":
                yield f"{path}.restartPolicy: must be Never in SidecarMode; remove it"


def times_and_limits_make_sense(document: Document) -> Iterator[str]:
    """Negative ones, and those that have no effect."""
    job = _job(document)
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(field, 1) <= 0:
            yield f"spec.{field}: {job[field]} given, must be more than 0; remove it for no deadline"
    for field in ("backoffLimit", "ttlSecondsAfterFinished"):
        if job.get(field, 0) < 0:
            yield f"spec.{field}: {job[field]} given, must be 0 or more; raise it"
    if job.get("submitterConfig", {}).get("backoffLimit", 0) < 0:
        yield "spec.submitterConfig.backoffLimit: must be 0 or more; raise it"
    if not job.get("shutdownAfterJobFinishes"):
        if job.get("ttlSecondsAfterFinished"):
            yield "spec.ttlSecondsAfterFinished: has no effect without shutdownAfterJobFinishes: true; add that"
        if job.get("suspend"):
            yield "spec.suspend: needs shutdownAfterJobFinishes: true; add that, and remove deletion rules"
    try:
        parsed = yaml.safe_load(job.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        parsed = "no YAML"
    if parsed is not None and not isinstance(parsed, dict):
        yield "spec.runtimeEnvYAML: is no YAML mapping; mend it, or remove it"


def deletion_is_in_order(document: Document) -> Iterator[str]:
    """Rules exclude the older ways, and each other in the wrong order."""
    job = _job(document)
    strategy, rules = job.get("deletionStrategy", {}), _deletion_rules(job)
    where = "spec.deletionStrategy"
    if ("onSuccess" in strategy) != ("onFailure" in strategy):
        yield f"{where}: onSuccess and onFailure go together only; use deletionRules"
    if not rules:
        return
    if job.get("shutdownAfterJobFinishes"):
        yield f"{where}.deletionRules: cannot be with shutdownAfterJobFinishes; remove one of the two"
    if "onSuccess" in strategy or "onFailure" in strategy:
        yield f"{where}.deletionRules: cannot be with onSuccess or onFailure; remove those"
    elastic = job.get("rayClusterSpec", {}).get("enableInTreeAutoscaling")
    after: dict[tuple[str, str], int] = {}
    for rule in rules:
        policy, condition = rule["policy"], rule["condition"]
        states = [f"{kind} {condition[kind]}" for kind in ("jobStatus", "jobDeploymentStatus") if kind in condition]
        if len(states) != 1:
            yield f"{where}: {policy} must have exactly one of jobStatus and jobDeploymentStatus; give one"
            continue
        if condition.get("ttlSeconds", 0) < 0:
            yield f"{where}: {policy} at {states[0]} has ttlSeconds below 0; raise them"
        if (states[0], policy) in after:
            yield f"{where}: {policy} at {states[0]} stands twice; remove one"
        if policy == "DeleteWorkers" and elastic:
            yield f"{where}: DeleteWorkers cannot be with autoscaling, which would bring them back; use DeleteCluster"
        after[states[0], policy] = condition.get("ttlSeconds", 0)
    for state in sorted({state for state, _ in after}):
        known = [(policy, after[state, policy]) for policy in POLICIES if (state, policy) in after]
        for (first, early), (then, late) in pairwise(known):
            if early > late:
                yield f"{where}: at {state} {then} comes after {late} s, before {first} after {early} s; give it more seconds"


def groups_are_whole(document: Document) -> Iterator[str]:
    """Every group has a container and both bounds."""
    for path, pod in _pods(document):
        if not pod.get("containers"):
            yield f"{path}: has no container; add one"
    for path, group in _worker_groups(document):
        fewest, most = group.get("minReplicas"), group.get("maxReplicas")
        if fewest is None or most is None:
            yield f"{path}: must have both minReplicas and maxReplicas; add them"
        elif not 0 <= fewest <= most:
            yield f"{path}: minReplicas {fewest} and maxReplicas {most} are not 0 <= min <= max; change them"
        elif not fewest <= group.get("replicas", fewest) <= most:
            yield f"{path}: replicas {group['replicas']} lie outside of {fewest} to {most}; change them"


def resources_stand_once(document: Document) -> Iterator[str]:
    """Parameters of `ray start` that have a field of their own."""
    for path, group in _groups(document):
        parameters = group.get("rayStartParams", {})
        twice = [name for name in RESOURCE_PARAMETERS if parameters.get(name)]
        if twice and group.get("resources"):
            yield f"{path}: {twice[0]} in rayStartParams cannot be with resources; use one of the two"
        if "labels" in parameters:
            yield f"{path}: labels in rayStartParams are refused; use {path}.labels"


def autoscaler_v2_is_alone(document: Document) -> Iterator[str]:
    """It replaces pods itself, and is chosen in one place only."""
    path, cluster = _cluster(document)
    options, head = cluster.get("autoscalerOptions", {}), [p for p in _pods(document) if "head" in p[0]]
    chosen = [
        e for _, pod in head for c in pod.get("containers", []) for e in c.get("env", [])
        if e.get("name") == "RAY_enable_autoscaler_v2"
    ]  # fmt: skip
    elastic = cluster.get("enableInTreeAutoscaling", False)
    old = options.get("version", "v2" if _at_least(cluster, (2, 47)) else "v1") == "v1"
    if chosen and "version" in options:
        yield f"{path}.autoscalerOptions.version: stands in the head's environment, too; remove RAY_enable_autoscaler_v2 there"
    if chosen and not elastic:
        yield f"{path}: RAY_enable_autoscaler_v2 has no autoscaler to choose; set enableInTreeAutoscaling: true"
    if elastic and not old:
        for where, pod in _pods(document):
            if pod.get("restartPolicy", "Never") != "Never":
                yield f"{where}.restartPolicy: must be Never under autoscaler v2, which replaces pods; remove it"
    for where, group in _worker_groups(document):
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield f"{where}.idleTimeoutSeconds: must be 0 or more; raise it"
        if "idleTimeoutSeconds" in group and (old or not elastic):
            yield f"{where}.idleTimeoutSeconds: needs autoscaler v2; enable it, or remove the field"
        if "priority" in group and (old or not elastic or not _at_least(cluster, (2, 56))):
            yield f"{where}.priority: needs autoscaler v2 and rayVersion 2.56; enable them, or remove the field"
        if group.get("suspend") and elastic:
            yield f"{where}.suspend: cannot be with autoscaling; remove one of the two"


def tokens_are_possible(document: Document) -> Iterator[str]:
    """KubeRay leaves the cluster open unless the mode is written down."""
    path, cluster = _cluster(document)
    if not path:
        return
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token":
        yield f"{path}.authOptions.mode: is not token, so anyone who reaches the cluster runs code on it; write mode: token"
    elif not _at_least(cluster, (2, 52)):
        yield f"{path}.rayVersion: {cluster.get('rayVersion', 'none')!r} given, tokens need 2.52.0 or later; write the image's"
    if options.get("enableK8sTokenAuth"):
        if document["kind"] in ("RayJob", "RayService"):
            yield f"{path}.authOptions.enableK8sTokenAuth: is refused in a {document['kind']}; remove it"
        elif "secretName" in options or not _at_least(cluster, (2, 55)):
            yield f"{path}.authOptions.enableK8sTokenAuth: needs rayVersion 2.55 and no secretName; change them"


def upgrades_are_of_clusters(document: Document) -> Iterator[str]:
    """A job's cluster is never upgraded."""
    path, cluster = _cluster(document)
    kind = cluster.get("upgradeStrategy", {}).get("type")
    if kind is not None and document["kind"] != "RayCluster":
        yield f"{path}.upgradeStrategy: is refused in the cluster of a {document['kind']}; remove it"
    elif kind not in (None, "Recreate", "None"):
        yield f"{path}.upgradeStrategy.type: {kind!r} is neither Recreate nor None; use one of them"


def gates_are_respected(document: Document) -> Iterator[str]:
    """`networkPolicy` and `tlsOptions` are alpha: off unless the operator's gates are opened."""
    path, cluster = _cluster(document)
    for field in ("networkPolicy", "tlsOptions"):
        if field in cluster:
            yield f"{path}.{field}: needs a feature gate of the operator that is closed; remove it, NetworkPolicies of your own do without"
    if "tlsOptions" in cluster:
        for where, pod in _pods(document):
            names = {e.get("name") for c in pod.get("containers", []) for e in c.get("env", [])}
            if own := sorted(names & set(TLS_VARIABLES)):
                yield f"{where}: {own[0]} cannot be with tlsOptions, which set it; remove it"


def managers_are_known(document: Document) -> Iterator[str]:
    """By a rule in the schema that only a server evaluates."""
    for path, holder in (("spec", document.get("spec", {})), _cluster(document)):
        if holder.get("managedBy", "ray.io/kuberay-operator") not in (
            "ray.io/kuberay-operator",
            "kueue.x-k8s.io/multikueue",
        ):
            yield f"{path}.managedBy: {holder['managedBy']!r} is unknown; use ray.io/kuberay-operator"
    schedule = document.get("spec", {}).get("schedule", "")
    if "TZ=" in schedule:
        yield "spec.schedule: has a time zone in it; use spec.timeZone"


RULES: tuple[Callable[[Document], Iterator[str]], ...] = (
    name_is_short_enough,
    submission_mode_exists,
    something_runs,
    mode_allows_the_rest,
    times_and_limits_make_sense,
    deletion_is_in_order,
    groups_are_whole,
    resources_stand_once,
    autoscaler_v2_is_alone,
    tokens_are_possible,
    upgrades_are_of_clusters,
    gates_are_respected,
    managers_are_known,
)


def _job(document: Document) -> Mapping[str, Any]:
    """The spec of a job; empty for other kinds."""
    spec: Mapping[str, Any] = document.get("spec", {})
    if document["kind"] == "RayCronJob":
        spec = spec.get("jobTemplate", {})
    return spec if document["kind"] in ("RayJob", "RayCronJob") else {}


def _cluster(document: Document) -> tuple[str, Mapping[str, Any]]:
    """Where the cluster is described, and how; empty if a job selects another one."""
    spec = document.get("spec", {})
    place: dict[str, tuple[str, Mapping[str, Any] | None]] = {
        "RayCluster": ("spec", spec),
        "RayJob": ("spec.rayClusterSpec", spec.get("rayClusterSpec")),
        "RayService": ("spec.rayClusterConfig", spec.get("rayClusterConfig")),
        "RayCronJob": ("spec.jobTemplate.rayClusterSpec", spec.get("jobTemplate", {}).get("rayClusterSpec")),
    }
    path, cluster = place[document["kind"]]
    return ("", {}) if cluster is None else (path, cluster)


def _worker_groups(document: Document) -> list[tuple[str, Mapping[str, Any]]]:
    path, cluster = _cluster(document)
    return [(f"{path}.workerGroupSpecs[{i}]", group) for i, group in enumerate(cluster.get("workerGroupSpecs", []))]


def _groups(document: Document) -> list[tuple[str, Mapping[str, Any]]]:
    path, cluster = _cluster(document)
    head = [(f"{path}.headGroupSpec", cluster["headGroupSpec"])] if "headGroupSpec" in cluster else []
    return [*head, *_worker_groups(document)]


def _pods(document: Document) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{p}.template.spec", group.get("template", {}).get("spec", {})) for p, group in _groups(document)]


def _deletion_rules(job: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    rules: Sequence[Mapping[str, Any]] = job.get("deletionStrategy", {}).get("deletionRules", [])
    return rules


def _at_least(cluster: Mapping[str, Any], least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
    return found is not None and tuple(int(n) for n in found.groups()) >= least
