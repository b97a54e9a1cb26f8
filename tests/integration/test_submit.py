"""`imaml submit --k8s --dry-run`: what it prints can be applied, and what cannot work is one sentence."""

import pytest
import torch
import yaml
from helpers import crds, pod_security
from helpers.command import ROOT, imaml, imaml_here
from helpers.manifests import IMAGE
from helpers.runs import raw_config

from cluster import rules
from cluster.kuberay import CONFIG_KEY
from imaml_dist.config.load import build_config, load_config
from imaml_dist.distributed.build import open_dataset, resolve
from imaml_dist.errors import ConfigError
from imaml_dist.training.run_directory import RunDirectory
from pipelines import train

CONFIG = ROOT / "pipelines" / "configs" / "omniglot.yaml"
REACHABLE = ("--set", "data.url=s3://imaml/data/omniglot", "--set", "run.device=cpu")
SUBMIT = ("submit", str(CONFIG), "--k8s", "--dry-run", "--image", IMAGE, "--run-dir", "s3://imaml/runs/omniglot")
CANARIES = {
    "AWS_ACCESS_KEY_ID": "CANARY-1f0a",
    "AWS_SECRET_ACCESS_KEY": "CANARY-2b1c",
    "RAY_AUTH_TOKEN": "CANARY-3c2d",
    "MLFLOW_TRACKING_PASSWORD": "CANARY-4d3e",
}


def test_the_manifest_is_valid_and_holds_the_whole_configuration_and_no_secret(tmp_path):
    code, output = imaml(*SUBMIT, *REACHABLE, "--set", "run.workers={min: 2, max: 6}", cwd=tmp_path, **CANARIES)
    assert code == 0, output
    assert "CANARY" not in output
    (document,) = yaml.safe_load_all(output)
    assert crds.violations(document) == rules.broken(document) == pod_security.refused(document) == []
    head = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    carried = yaml.safe_load(head["metadata"]["annotations"][CONFIG_KEY])
    asked = load_config(CONFIG, [*REACHABLE[1::2], "run.workers={min: 2, max: 6}"])
    assert build_config(carried) == asked
    assert document["spec"]["entrypoint"] == "imaml train /etc/imaml/config.yaml --run-dir s3://imaml/runs/omniglot"


def test_the_same_command_gives_the_same_manifest(tmp_path):
    assert imaml_here(*SUBMIT, *REACHABLE, cwd=tmp_path) == imaml_here(*SUBMIT, *REACHABLE, cwd=tmp_path)


def test_options_of_a_file_reach_the_manifest(tmp_path):
    (tmp_path / "kube.yaml").write_text("namespace: other\nqueue: team\nsecrets: {}\nenv: {AWS_REGION: eu-1}\n")
    code, output = imaml_here(*SUBMIT, *REACHABLE, "--options", "kube.yaml", cwd=tmp_path)
    assert code == 0, output
    assert yaml.safe_load(output)["metadata"]["namespace"] == "other"
    assert "secretKeyRef" not in output
    assert "eu-1" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (REACHABLE[2:], "data.url: data/omniglot given, but pods share no folder"),
        (REACHABLE[:2], "run.device: auto given"),
        ((*REACHABLE, "--run-dir", "runs/x"), "--run-dir: runs/x given, but pods share no folder"),
        ((*REACHABLE, "--run-dir", "s3://me:CANARY@b/x"), "credentials do not belong in a URL"),
        ((*REACHABLE, "--set", "run.backend=local"), "run.backend: local given"),
        ((*REACHABLE, "--set", "warm_start.path=runs/a"), "warm_start.path: runs/a given"),
        (
            (*REACHABLE, "--set", "validate.manifest=frozen.jsonl"),
            "validate.manifest: frozen.jsonl given, but pods share no",
        ),
        ((*REACHABLE, "--image", "imaml:latest"), "must have a tag other than latest"),
        (
            (*REACHABLE, "--set", "storage.cache_bytes=20000000000"),
            "cache: 20Gi given, but storage.cache_bytes = 20000000000",
        ),
        ((*REACHABLE, "--options", "none.yaml"), "none.yaml is no file of options"),
        ((*REACHABLE, "--set", "run.stps=3"), "did you mean run.steps"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_2(tmp_path, arguments, said):
    code, output = imaml_here(*SUBMIT, *arguments, cwd=tmp_path)
    assert code == 2
    assert said in output
    assert "CANARY" not in output


def test_only_what_exists_is_offered(tmp_path):
    code, output = imaml_here("submit", str(CONFIG), "--run-dir", "s3://b/r", cwd=tmp_path)
    assert code == 2
    assert "--address http://head:8265" in output and "--k8s" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--address", "http://head:8265", "--dry-run"), "--dry-run given without --k8s"),
        (
            ("--address", "http://head:8265", "--image", "a:1", "--options", "x"),
            "--image, --options given without --k8s",
        ),
        (("--k8s", "--id", "mine"), "--id given with --k8s"),
        (("--k8s", "--address", "http://head:8265"), "which are two clusters"),
    ],
)
def test_options_of_another_kind_of_cluster_are_not_passed_over(tmp_path, arguments, said):
    code, output = imaml_here("submit", str(CONFIG), "--run-dir", "s3://b/r", *REACHABLE, *arguments, cwd=tmp_path)
    assert code == 2
    assert said in output and output.count("\n") == 1


def test_the_environments_ray_cluster_gives_way_to_k8s(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    code, output = imaml_here(*SUBMIT, *REACHABLE, cwd=tmp_path)
    assert code == 0 and "kind: RayJob" in output


def test_a_head_without_a_gpu_prepares_a_run_of_workers_that_have_some(data, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = build_config(raw_config(data, backend="ray", device="cuda"))
    with pytest.raises(ConfigError, match="no GPU is visible here"):
        resolve(config, cuda=train.gpus_elsewhere(config))
    monkeypatch.setenv("RAY_ADDRESS", "tiny-head-svc:6379")
    resolved = resolve(config, cuda=train.gpus_elsewhere(config))
    assert (resolved.run.device, resolved.run.execution) == ("cuda", "vmap")
    train._preflight(resolved, open_dataset(resolved), RunDirectory(tmp_path / "run"), fresh=False)
