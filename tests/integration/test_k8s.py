"""The overlays as kubectl renders them: valid by every schema and rule, closed to root and to strangers, without a secret."""

import re

import kubernetes_validate
import pytest
import yaml
from helpers import crds, pod_security
from helpers.manifests import K8S, OVERLAYS, documents, every_container, of_job, of_kind, pods, rendered

from cluster import rules
from cluster.kuberay import CONFIG_KEY
from cluster.reproduce import ray_starts
from imaml_dist.config.load import build_config

KUBERNETES = ("1.32", "1.37")
"""The oldest and the newest that manifests are checked against."""

OTHERS = {"kueue.x-k8s.io/v1beta1", "monitoring.coreos.com/v1"}
"""Kinds of which there is no schema here."""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kinds_of_kuberay_are_valid(overlay):
    found = of_kind(overlay, *rules.KINDS)
    assert len(found) >= 3
    for document in found:
        assert rules.broken(document) == []
    for document in found:
        assert crds.violations(document) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("release", KUBERNETES)
def test_kinds_of_kubernetes_are_valid(overlay, release):
    checked = 0
    for document in documents(overlay):
        if document["apiVersion"].partition("/")[0] != "ray.io" and document["apiVersion"] not in OTHERS:
            kubernetes_validate.validate(document, release, strict=True)
            checked += 1
    assert checked >= 19


def test_a_mistake_in_a_kind_of_kubernetes_is_found():
    (server,) = [d for d in of_kind("dev", "Deployment") if d["metadata"]["name"] == "mlflow"]
    server = yaml.safe_load(yaml.safe_dump(server))
    server["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        kubernetes_validate.validate(server, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_takes_every_pod(overlay):
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    seen = 0
    for document in documents(overlay):
        assert pod_security.refused(document) == []
        seen += sum(1 for _ in pods(document))
    assert seen >= 6


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_of_one_namespace_and_of_one_stage(overlay):
    stages = set()
    for document in documents(overlay):
        clusterwide = ("Namespace", "ClusterQueue", "ResourceFlavor")
        assert document["metadata"].get("namespace", "imaml") == "imaml"
        assert ("namespace" in document["metadata"]) != (document["kind"] in clusterwide), document["metadata"]
        stages.add(document["metadata"]["labels"]["imaml/stage"])
    assert stages - {"cluster"} == {"platform", "prepare", "train", "sweep", "evaluate"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_stands_in_a_manifest(overlay):
    assert not of_kind(overlay, "Secret")
    for container in every_container(overlay):
        assert "envFrom" not in container
        for variable in container.get("env", []):
            if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", variable["name"]):
                assert list(variable["valueFrom"]) == ["secretKeyRef"], variable
    assert not re.search(r"://[^/\s:]+:[^/\s@]+@", rendered(overlay)), "a URL with a password"
    assert not re.findall(r"[A-Za-z0-9+=]{32,}", rendered(overlay)), "what looks like a key"


def test_no_file_of_k8s_holds_a_key():
    for path in K8S.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|^kind: Secret", text, re.MULTILINE), path
            assert not re.search(r"[A-Za-z0-9+/]{40,}={1,2}", text), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_pinned_and_runs_have_one(overlay):
    images = {container["image"] for container in every_container(overlay)}
    for image in images:
        assert re.search(r"@sha256:[0-9a-f]{64}$|:[\w.-]*\d[\w.-]*$", image), image
        assert not image.endswith(":latest")
    assert len([image for image in images if "imaml" in image]) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters_have_tokens_equal_resources_shared_memory_and_no_probes_of_ours(overlay):
    for document in of_kind(overlay, "RayJob", "RayCluster"):
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        assert cluster["authOptions"] == {"mode": "token"}
        for labels, pod in pods(document):
            assert not {key for key in labels if key.startswith("ray.io/") or key == "app.kubernetes.io/name"}
            container = pod["containers"][0]
            assert not [key for key in container if key.endswith("Probe")]
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            (shm,) = [v for v in pod["volumes"] if v["name"] == "shm"]
            assert shm["emptyDir"]["medium"] == "Memory"
        for group in cluster.get("workerGroupSpecs", []):
            resources = group["template"]["spec"]["containers"][0]["resources"]
            assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_can_be_tried_again_and_are_not_left_waiting(overlay):
    jobs = of_kind(overlay, "RayJob")
    assert sorted(job["metadata"]["name"] for job in jobs) == ["evaluate", "prepare", "sweep", "train"]
    for job in jobs:
        spec = job["spec"]
        assert spec["submissionMode"] == "HTTPMode"
        assert spec["backoffLimit"] >= 1
        assert spec["preRunningDeadlineSeconds"] > 0
        assert "--fresh" not in spec["entrypoint"]
        assert ("deletionStrategy" in spec) != spec.get("shutdownAfterJobFinishes", False)
        assert spec.get("suspend", False) == (overlay == "kueue")
        assert ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]) == (overlay == "kueue")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_trains_asks_for_what_its_cluster_offers(overlay):
    train = of_job(overlay, "train")
    cluster = train["spec"]["rayClusterSpec"]
    text = cluster["headGroupSpec"]["template"]["metadata"]["annotations"][CONFIG_KEY]
    config = build_config(yaml.safe_load(text))
    groups = cluster["workerGroupSpecs"]
    assert config.run.bounds == (sum(g["minReplicas"] for g in groups), sum(g["maxReplicas"] for g in groups))
    assert cluster["enableInTreeAutoscaling"] == (overlay == "gpu")
    assert config.run.device == ("cuda" if overlay == "gpu" else "cpu")
    head, *workers = ray_starts(train, "head", "name")
    assert "--num-cpus=0" in head.command
    for one in workers:
        assert f"--num-cpus={config.run.threads}" in one.command
        assert ("--num-gpus=1" in one.command) == (overlay == "gpu")


def test_gpu_workers_come_from_two_pools():
    train = of_job("gpu", "train")
    steady, passing = train["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert steady["minReplicas"] == 2 and passing["minReplicas"] == 0
    keys = [t["key"] for t in passing["template"]["spec"]["tolerations"]]
    assert keys == ["nvidia.com/gpu", "imaml/preemptible"]
    head = train["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "serviceAccountName" not in head, "KubeRay's, with the rights of its autoscaler"
    assert all(g["template"]["spec"]["serviceAccountName"] == "imaml-ray" for g in (steady, passing))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_but_an_elastic_head_may_ask_kubernetes(overlay):
    for document in documents(overlay):
        whole = document.get("spec", {})
        elastic = whole.get("rayClusterSpec", whole).get("enableInTreeAutoscaling", False)
        for labels, spec in pods(document):
            if not (elastic and labels.get("app.kubernetes.io/component") == "head"):
                assert spec["automountServiceAccountToken"] is False
                assert spec["serviceAccountName"] in {a["metadata"]["name"] for a in of_kind(overlay, "ServiceAccount")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rights_are_few(overlay):
    assert not of_kind(overlay, "ClusterRole", "ClusterRoleBinding")
    for role in of_kind(overlay, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]


def selected(policy, labels):
    chosen = policy["spec"]["podSelector"]
    wanted = chosen.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(e["key"]) in e["values"] for e in chosen.get("matchExpressions", []))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_denied_and_every_pod_is_allowed_what_it_needs(overlay):
    policies = of_kind(overlay, "NetworkPolicy")
    (everything,) = [p for p in policies if p["metadata"]["name"] == "deny-all"]
    assert everything["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def open_to(labels, direction):
        rules_of = [r for p in policies if selected(p, labels) for r in p["spec"].get(direction, [])]
        return {port["port"] for rule in rules_of for port in rule.get("ports", [])}, rules_of

    head = {"app.kubernetes.io/part-of": "imaml", "app.kubernetes.io/component": "head"}
    worker = {"app.kubernetes.io/part-of": "imaml", "app.kubernetes.io/component": "worker"}
    assert open_to(head, "egress")[0] >= {53, 443, 5000, 6443}
    assert open_to(worker, "egress")[0] >= {53, 443, 5000}
    assert 6443 not in open_to(worker, "egress")[0]
    assert 8265 in open_to(head, "ingress")[0] and 8265 not in open_to(worker, "ingress")[0]
    assert open_to({"app.kubernetes.io/component": "mlflow"}, "egress")[0] >= {53, 443, 5432}
    assert open_to({"app.kubernetes.io/component": "mlflow"}, "ingress")[0] == {5000}
    assert open_to({"app.kubernetes.io/component": "postgres"}, "ingress")[0] == {5432}
    assert open_to({"app.kubernetes.io/component": "postgres"}, "egress")[0] == {53}
    if overlay == "dev":
        assert open_to({"app.kubernetes.io/component": "s3"}, "ingress")[0] == {9000}
        for who in (head, worker, {"app.kubernetes.io/component": "mlflow"}):
            assert 9000 in open_to(who, "egress")[0]
        assert open_to({"app.kubernetes.io/component": "make-bucket"}, "egress")[0] == {53, 9000}
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert rule.get("from"), f"{policy['metadata']['name']}: lets anyone in"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_their_pods_and_ports_their_names(overlay):
    for service in of_kind(overlay, "Service"):
        found = [
            spec
            for document in of_kind(overlay, "Deployment", "StatefulSet")
            for labels, spec in pods(document)
            if service["spec"]["selector"].items() <= labels.items()
        ]
        assert len(found) == 1, service["metadata"]["name"]
        names = {port["name"] for container in found[0]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for monitor in of_kind(overlay, "PodMonitor"):
        wanted = [e["values"] for e in monitor["spec"]["selector"]["matchExpressions"]]
        assert wanted == [["imaml"], ["head", "worker"]]
        assert [e["port"] for e in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_mlflow_migrates_before_it_serves_and_knows_its_own_names():
    (server,) = [d for d in of_kind("gpu", "Deployment") if d["metadata"]["name"] == "mlflow"]
    pod = server["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["command"][:3] == ["mlflow", "db", "upgrade"]
    assert server["spec"]["strategy"] == {"type": "Recreate"}
    variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert {"mlflow:5000", "localhost:5000"} <= set(variables["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    (run,) = {v["value"] for c in every_container("gpu") for v in c["env"] if v["name"] == "MLFLOW_TRACKING_URI"}
    assert run.removeprefix("http://") in variables["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
