"""The manifests beside the rest of the project: their commands run, they are what the code makes, their README names what they need."""

import ast
import importlib.util
import json
import re
import shlex
import string
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers import crds, dockerfile, pod_security
from helpers.command import ROOT, imaml_here
from helpers.manifests import K8S, OVERLAYS, documents, every_container, of_job, of_kind, pods

from cluster import rules
from cluster.kuberay import CONFIG_FILE, CONFIG_KEY
from cluster.resources import quantity
from imaml_dist.config.load import load_config
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.storage.opening import open_storage
from imaml_dist.sweeps.feasible import check_feasible

SMALL = ("run.steps=3", "run.checkpoint_every=1", "run.backend=local", "model.channels=4", "algorithm.inner.steps=1",
         "run.tasks_per_step=4", "run.chunk=4",
         "outer.schedule=constant", "validate.tasks=0", "evaluate.tasks=4", "tracking.mlflow=false")  # fmt: skip


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
    assert [stage for _, stage in steps] == ["platform", "prepare", "train", "evaluate", "cluster"]
    for overlay, stage in steps:
        assert overlay in OVERLAYS
        assert any(d["metadata"]["labels"]["imaml/stage"] == stage for d in documents(overlay))
    for path in re.findall(r"-f (k8s/\S+)", README):
        assert (ROOT / path).is_file()
    assert len(README.splitlines()) <= 100, "one page"


def test_the_readme_sends_jobs_to_the_cluster_for_development_which_has_room_for_them():
    (cluster,) = of_kind("dev", "RayCluster")
    name = cluster["metadata"]["name"]
    assert f"service/{name}-head-svc 8265:8265" in README and f"get secret {name} -o" in README, "as KubeRay names them"
    assert cluster["spec"]["authOptions"] == {"mode": "token"}, "without secretName the Secret has the cluster's name"
    (line,) = [line for line in README.splitlines() if line.startswith("imaml submit") and "--address" in line]
    words = shlex.split(line)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_config(ROOT / words[2], overrides)
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert config.run.bounds == (1, 1) and workers["maxReplicas"] == 1
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert quantity(limits["cpu"], "cpu") >= config.run.threads


def test_the_run_of_ones_own_fits_the_platform(tmp_path):
    """The command of the README gives a job whose Secrets, namespace and account are the platform's."""
    (line,) = [line for line in README.splitlines() if line.startswith("imaml submit") and "--k8s" in line]
    code, output = imaml_here(*shlex.split(line)[1:], "--dry-run", cwd=ROOT)
    assert code == 0, output
    job = yaml.safe_load(output)
    assert rules.broken(job) == pod_security.refused(job) == crds.violations(job) == []
    train = of_job("dev", "train")
    for own, shipped in zip(pods(job), pods(train), strict=True):
        assert own[0].keys() == shipped[0].keys()
        names = [{v["name"] for v in pod["containers"][0]["env"]} for _, pod in (own, shipped)]
        assert names[1] - names[0] == {"IMAML_BUCKET"}
        assert own[1]["serviceAccountName"] == shipped[1]["serviceAccountName"]
