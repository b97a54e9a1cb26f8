"""Thirty mistakes that people make in manifests of KubeRay: each is caught, by the schema or by a rule that names it."""

import copy

import pytest
from helpers import crds, pod_security
from helpers.manifests import a_rayjob

from cluster import rules
from cluster.resources import Needs

CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec")
HEAD_POD = (*HEAD, "template", "spec")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")
RULES = ("spec", "deletionStrategy", "deletionRules")
GONE = object()

MUTANTS = {
    # What the schema refuses.
    "a misspelt field": ("schema", {(*CLUSTER, "rayversion"): "2.60.0"}, "rayversion"),
    "a number in quotes": ("schema", {("spec", "backoffLimit"): "3"}, "backoffLimit"),
    "an unknown deletion policy": ("schema", {(*RULES, 0, "policy"): "DeletePods"}, "DeletePods"),
    "an unknown token mode": ("schema", {(*CLUSTER, "authOptions", "mode"): "on"}, "'on'"),
    "a group without a name": ("schema", {(*GROUP, "groupName"): GONE}, "groupName"),
    "requests where resources belong": ("schema", {(*POD, "containers", 0, "requests"): {"cpu": "1"}}, "requests"),
    "a parameter that is no string": ("schema", {(*HEAD, "rayStartParams", "num-cpus"): 0}, "is not of type 'string'"),
    # What only the operator would find.
    "a name that is too long": ("rule", {("metadata", "name"): "a" * 48}, "at most 47 characters"),
    "a name with a dot": ("rule", {("metadata", "name"): "omniglot.5w"}, "no DNS-1035 label"),
    "a misspelt submission mode": ("rule", {("spec", "submissionMode"): "HttpMode"}, "none of K8sJobMode, HTTPMode"),
    "no cluster at all": ("rule", {CLUSTER: GONE}, "neither rayClusterSpec nor a clusterSelector"),
    "retries on a selected cluster": (
        "rule",
        {("spec", "clusterSelector"): {"ray.io/cluster": "dev"}},
        "spec.backoffLimit: cannot be with",
    ),
    "retries in interactive mode": (
        "rule",
        {("spec", "submissionMode"): "InteractiveMode"},
        "must be 0 in InteractiveMode",
    ),
    "a submitter beside a sidecar": (
        "rule",
        {("spec", "submissionMode"): "SidecarMode", ("spec", "submitterConfig"): {"backoffLimit": 1}},
        "cannot be in SidecarMode",
    ),
    "a deadline of zero": ("rule", {("spec", "activeDeadlineSeconds"): 0}, "must be more than 0"),
    "a negative retry": ("rule", {("spec", "backoffLimit"): -1}, "must be 0 or more"),
    "a time to live without a shutdown": ("rule", {("spec", "ttlSecondsAfterFinished"): 60}, "has no effect without"),
    "suspended for Kueue without a shutdown": ("rule", {("spec", "suspend"): True}, "needs shutdownAfterJobFinishes"),
    "a runtime environment that is no mapping": ("rule", {("spec", "runtimeEnvYAML"): "- pip"}, "is no YAML mapping"),
    "a runtime environment that is no YAML": (
        "rule",
        {("spec", "runtimeEnvYAML"): "env_vars: {a: [}"},
        "is no YAML mapping",
    ),
    "deletion rules beside a shutdown": (
        "rule",
        {("spec", "shutdownAfterJobFinishes"): True},
        "cannot be with shutdownAfterJobFinishes",
    ),
    "the job deleted before its cluster": (
        "rule",
        {(*RULES, 1, "condition", "ttlSeconds"): 5},
        "DeleteSelf comes after 5 s",
    ),
    "the same deletion twice": ("rule", {(*RULES, 1, "policy"): "DeleteCluster"}, "stands twice"),
    "a deletion at two states": ("rule", {(*RULES, 0, "condition", "jobDeploymentStatus"): "Failed"}, "exactly one of"),
    "workers deleted under an autoscaler": (
        "rule",
        {(*RULES, 0, "policy"): "DeleteWorkers"},
        "cannot be with autoscaling",
    ),
    "more workers at least than at most": ("rule", {(*GROUP, "minReplicas"): 9}, "are not 0 <= min <= max"),
    "replicas outside of the bounds": ("rule", {(*GROUP, "replicas"): 9}, "lie outside of 2 to 4"),
    "resources in two places": (
        "rule",
        {(*HEAD, "resources"): {"CPU": "1"}},
        "num-cpus in rayStartParams cannot be with resources",
    ),
    "labels as a parameter": (
        "rule",
        {(*GROUP, "rayStartParams", "labels"): "a=b"},
        "labels in rayStartParams are refused",
    ),
    "pods that restart under autoscaler v2": (
        "rule",
        {(*POD, "restartPolicy"): "Always"},
        "must be Never under autoscaler v2",
    ),
    "the autoscaler chosen twice": (
        "rule",
        {(*HEAD_POD, "containers", 0, "env", 0): {"name": "RAY_enable_autoscaler_v2", "value": "1"}},
        "stands in the head's environment, too",
    ),
    "a priority that Ray is too old for": (
        "rule",
        {(*GROUP, "priority"): 1, (*CLUSTER, "rayVersion"): "2.55.0"},
        "needs autoscaler v2 and rayVersion 2.56",
    ),
    "no token": ("rule", {(*CLUSTER, "authOptions"): GONE}, "anyone who reaches the cluster runs code"),
    "a token that Ray is too old for": ("rule", {(*CLUSTER, "rayVersion"): "2.51.1"}, "tokens need 2.52.0"),
    "a token and no version": ("rule", {(*CLUSTER, "rayVersion"): GONE}, "'none' given"),
    "tokens of Kubernetes in a job": (
        "rule",
        {(*CLUSTER, "authOptions", "enableK8sTokenAuth"): True},
        "is refused in a RayJob",
    ),
    "an upgrade of a job's cluster": (
        "rule",
        {(*CLUSTER, "upgradeStrategy"): {"type": "Recreate"}},
        "is refused in the cluster of a RayJob",
    ),
    "a gate that is closed": ("rule", {(*CLUSTER, "networkPolicy"): {"mode": "DenyAll"}}, "needs a feature gate"),
    "an unknown manager": ("rule", {("spec", "managedBy"): "me"}, "is unknown"),
    # What the namespace's pod security refuses.
    "a worker that may be root": ("security", {(*POD, "securityContext", "runAsNonRoot"): GONE}, "may run as root"),
    "a head that may gain privileges": (
        "security",
        {(*HEAD_POD, "containers", 0, "securityContext"): GONE},
        "may gain privileges",
    ),
    "an autoscaler that keeps capabilities": (
        "security",
        {(*CLUSTER, "autoscalerOptions", "securityContext"): GONE},
        "keeps capabilities",
    ),
    "a folder of the node": (
        "security",
        {(*POD, "volumes", 1): {"name": "cache", "hostPath": {"path": "/data"}}},
        "hostPath",
    ),
}

CHECKS = {"schema": crds.violations, "rule": rules.broken, "security": pod_security.refused}


@pytest.fixture
def sound():
    """An elastic run, which has every part that can be wrong."""
    return a_rayjob(Needs(2, 4, 1))


def mutated(document, changes):
    made = copy.deepcopy(document)
    for path, value in changes.items():
        *above, last = path
        holder = made
        for key in above:
            holder = holder[key]
        if value is GONE:
            del holder[last]
        else:
            holder[last] = value
    return made


@pytest.mark.parametrize("kind", CHECKS)
def test_no_check_minds_what_is_right(sound, kind):
    assert CHECKS[kind](sound) == []


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_caught(sound, mistake):
    kind, changes, said = MUTANTS[mistake]
    found = CHECKS[kind](mutated(sound, changes))
    assert any(said in sentence for sentence in found), found


@pytest.mark.parametrize("mistake", [m for m, (kind, _, _) in MUTANTS.items() if kind == "rule"])
def test_a_rule_says_where_and_what_to_do(sound, mistake):
    for sentence in rules.broken(mutated(sound, MUTANTS[mistake][1])):
        assert sentence.startswith("RayJob ")
        assert "; " in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        (
            "RayCluster",
            {"authOptions": {"mode": "token"}, "rayVersion": "2.60.0", "upgradeStrategy": {"type": "Rolling"}},
            "neither Recreate nor None",
        ),
        ("RayCluster", {"rayVersion": "2.60.0"}, "is not token"),
        ("RayService", {"rayClusterConfig": {"rayVersion": "2.60.0"}}, "spec.rayClusterConfig.authOptions.mode"),
        ("RayCronJob", {"schedule": "TZ=UTC 0 0 * * *"}, "use spec.timeZone"),
        ("RayCronJob", {"jobTemplate": {"backoffLimit": -1}}, "must be 0 or more"),
    ],
)
def test_other_kinds_are_looked_at_as_well(kind, spec, said):
    assert any(said in one for one in rules.broken({"kind": kind, "metadata": {"name": "x"}, "spec": spec}))


def test_kinds_of_others_are_left_alone():
    assert rules.broken({"kind": "Deployment", "metadata": {"name": "X" * 90}, "spec": {"suspend": True}}) == []
