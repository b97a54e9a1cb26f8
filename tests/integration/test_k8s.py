"""The overlays as kubectl renders them: valid by every schema and rule, closed to root and to strangers, without a secret."""

import ast
import importlib.util
import json
import re
import shlex
import string
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers import crds, dockerfile, pod_security
from helpers.command import ROOT, imaml_here
from helpers.manifests import K8S, OVERLAYS, documents, of_job, rendered

from cluster import rules
from cluster.kuberay import CONFIG_FILE, CONFIG_KEY
from cluster.reproduce import ray_starts
from imaml_dist.config.load import build_config
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.storage.opening import open_storage
from imaml_dist.sweeps.feasible import check_feasible

KUBERNETES = ("1.32", "1.37")
"""The oldest and the newest that manifests are checked against."""

OTHERS = {"kueue.x-k8s.io/v1beta1", "monitoring.coreos.com/v1"}
"""Kinds of which there is no schema here."""


def of_kind(overlay, *kinds):
    return [d for d in documents(overlay) if d["kind"] in kinds]


def pods(document):
    """Every pod of a manifest: (labels, spec)."""
    if isinstance(document, dict):
        spec = document.get("spec", {})
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield document.get("metadata", {}).get("labels", {}), spec
        for below in document.values():
            yield from pods(below)
    elif isinstance(document, list):
        for below in document:
            yield from pods(below)


def every_container(overlay):
    for document in documents(overlay):
        for _, spec in pods(document):
            yield from (*spec["containers"], *spec.get("initContainers", []))


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


SMALL = ("run.steps=3", "run.checkpoint_every=1", "run.backend=local", "model.channels=4", "algorithm.inner.steps=1",
         "run.tasks_per_step=4", "outer.schedule=constant", "validate.tasks=0", "evaluate.tasks=4", "tracking.mlflow=false")  # fmt: skip


def test_the_jobs_commands_train_and_evaluate_on_object_storage(moto_bucket, data, tmp_path, monkeypatch):
    """As the head would run them, with the configuration that it finds, at the size of a test and with data of a test."""
    url, options = moto_bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options.endpoint)
    for path in data.iterdir():
        open_storage(f"{url}/data/glyphs", options).write(path.name, path)
    jobs = {job["metadata"]["name"]: job["spec"] for job in of_kind("dev", "RayJob")}
    head = jobs["train"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (tmp_path / "config.yaml").write_text(head["metadata"]["annotations"][CONFIG_KEY])

    def run(name, *more):
        text = string.Template(jobs[name]["entrypoint"]).substitute(IMAML_BUCKET=url.removeprefix("s3://"))
        words = shlex.split(
            text.replace(CONFIG_FILE, str(tmp_path / "config.yaml")).replace("--tasks 600", "--tasks 4")
        )
        assert words[0] == "imaml"
        code, output = imaml_here(*words[1:], *more, cwd=tmp_path)
        assert code == 0, output
        return output

    small = [word for override in SMALL for word in ("--set", override)]
    run("train", *small, "--set", "run.steps=2")
    run("train", *small)
    starts = open_storage(f"{url}/runs/glyphs", options).read("starts.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 2], "it goes on"
    assert "is finished" in run("train", *small), "and after the end it does nothing"
    assert "%" in run("evaluate")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_sweep_is_one_and_all_its_pods_see_its_folder(overlay):
    sweep = of_job(overlay, "sweep")
    words = shlex.split(sweep["spec"]["entrypoint"])
    file = ROOT / words[2].removeprefix("/home/ray/")
    assert words[:2] == ["imaml", "sweep"]
    assert check_feasible(load_sweep(file, [words[i + 1] for i, word in enumerate(words) if word == "--set"]))
    (claim,) = of_kind(overlay, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == (["ReadWriteOnce"] if overlay == "dev" else ["ReadWriteMany"])
    folder = Path(words[words.index("--sweep-dir") + 1]).parent
    for _, pod in pods(sweep):
        (volume,) = [v["name"] for v in pod["volumes"] if v.get("persistentVolumeClaim") == {"claimName": "sweeps"}]
        assert {"name": volume, "mountPath": str(folder)} in pod["containers"][0]["volumeMounts"]
    assert len(list(pods(sweep))) == 2


def test_the_files_are_those_that_the_code_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("render", K8S / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    render.write(tmp_path, render.image())
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.yaml"))
    assert len(made) == 6
    for path in made:
        assert (K8S / path).read_text() == (tmp_path / path).read_text(), f"{path}: run k8s/render.py"


def test_ray_is_of_one_version_everywhere():
    constraints = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)$", constraints, re.MULTILINE)
    assert version("ray") == ray
    assert re.findall(r"^ARG RAY_VERSION=(\S+)$", dockerfile.PATH.read_text(), re.MULTILINE) == [ray]
    for overlay in OVERLAYS:
        for document in of_kind(overlay, "RayJob", "RayCluster"):
            cluster = document["spec"].get("rayClusterSpec", document["spec"])
            assert cluster["rayVersion"] == ray
        tags = {c["image"] for c in every_container(overlay) if "imaml:" in c["image"]}
        assert all(f"-ray{ray}-" in tag for tag in tags) and tags


def test_the_command_that_makes_the_bucket_is_python():
    (job,) = of_kind("dev", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    ast.parse(container["command"][2])


README = (K8S / "README.md").read_text()


def test_the_readme_creates_every_secret_that_is_referred_to():
    created = {
        (line.split()[6], key)
        for line in README.splitlines()
        if line.startswith("kubectl -n imaml create secret generic ")
        for key in re.findall(r"--from-literal=(\w+)=", line)
    }
    for overlay in OVERLAYS:
        for container in every_container(overlay):
            for variable in container.get("env", []):
                kept = variable.get("valueFrom", {}).get("secretKeyRef")
                assert kept is None or (kept["name"], kept["key"]) in created


def test_the_readme_applies_stages_that_there_are_in_overlays_that_there_are():
    steps = re.findall(r"-k k8s/overlays/(\w+) -l imaml/stage=(\w+)", README)
    assert [stage for _, stage in steps] == ["platform", "prepare", "train", "evaluate"]
    for overlay, stage in steps:
        assert overlay in OVERLAYS
        assert any(d["metadata"]["labels"]["imaml/stage"] == stage for d in documents(overlay))
    for path in re.findall(r"-f (k8s/\S+)", README):
        assert (ROOT / path).is_file()
    assert len(README.splitlines()) <= 100, "one page"


def test_the_run_of_ones_own_fits_the_platform(tmp_path):
    """The command of the README gives a job whose Secrets, namespace and account are the platform's."""
    (line,) = [line for line in README.splitlines() if line.startswith("imaml submit")]
    words = shlex.split(line.partition(" > ")[0])[1:]
    code, output = imaml_here(*words, cwd=ROOT)
    assert code == 0, output
    job = yaml.safe_load(output)
    assert rules.broken(job) == pod_security.refused(job) == crds.violations(job) == []
    train = of_job("dev", "train")
    for own, shipped in zip(pods(job), pods(train), strict=True):
        assert own[0].keys() == shipped[0].keys()
        names = [{v["name"] for v in pod["containers"][0]["env"]} for _, pod in (own, shipped)]
        assert names[1] - names[0] == {"IMAML_BUCKET"}
        assert own[1]["serviceAccountName"] == shipped[1]["serviceAccountName"]
