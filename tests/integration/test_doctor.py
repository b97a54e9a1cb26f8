"""`imaml doctor`: what is there, what is not, and how to mend it, on real parts."""

import gzip
import os
import re
from pathlib import Path

import pytest
import yaml
from helpers import crds, s3_server
from helpers.command import imaml_here
from helpers.gloo import free_port
from helpers.kube_api import KubeApi
from helpers.runs import raw_config, write_config

from imaml_dist.storage.opening import open_storage

MARKS = ("ok", "wrong", "-")


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """Somebody with nothing set up, and a wide terminal."""
    for name in os.environ.keys() - s3_server.clean_environment().keys():
        if not name.startswith("IMAML"):
            monkeypatch.delenv(name)
    for name in [n for n in os.environ if n.startswith(("RAY_", "MLFLOW_", "KUBE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "600")


def doctor(*arguments, cwd):
    """(exit code, {what: (mark, the rest)})."""
    code, output = imaml_here("doctor", *arguments, cwd=cwd)
    lines = (line.strip() for line in output.splitlines() if line.startswith(MARKS))
    rows = [re.split(r" {2,}", line, maxsplit=2) for line in lines]
    return code, {what: (mark, " | ".join(re.split(" {2,}", rest))) for mark, what, rest in rows}


def test_where_all_is_well_the_exit_code_is_0(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    code, found = doctor(str(config), "--run-dir", str(tmp_path / "runs" / "new"), cwd=tmp_path)
    assert code == 0, found
    assert {mark for mark, _ in found.values()} <= {"ok", "-"}
    assert "torch" in found["packages"][1] and "ray" in found["packages"][1]
    assert found["Python"][0] == found["data"][0] == found["run directory"][0] == "ok"
    assert str(data) in found["data"][1]
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
    assert doctor(cwd=tmp_path)[0] == 0


def test_what_the_configuration_needs_and_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch):
    raw = raw_config(tmp_path / "nowhere") | {"tracking": {"mlflow": True}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:CANARY@127.0.0.1:{free_port()}")
    code, found = doctor("c.yaml", "--run-dir", "/proc/none", "--set", "run.device=cuda", cwd=tmp_path)
    assert code == 3
    wrong = {what: text for what, (mark, text) in found.items() if mark == "wrong"}
    assert wrong.keys() == {"devices", "data", "run directory", "MLflow"}
    assert "imaml prepare" in wrong["data"]
    assert "--run-dir" in wrong["run directory"]
    assert "MLFLOW_TRACKING_URI" in wrong["MLflow"] and "CANARY" not in str(found)
    assert "run.device=cpu" in wrong["devices"]


def test_a_cluster_that_is_not_there(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    code, found = doctor(str(config), "--address", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert code == 3
    assert found["Ray dashboard"][0] == "wrong" and "check the address" in found["Ray dashboard"][1]


def test_a_bad_configuration_is_not_looked_at(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\nrun: {stps: 3}\n")
    code, output = imaml_here("doctor", "c.yaml", cwd=tmp_path)
    assert code == 2
    assert "did you mean run.steps" in output and "Python" not in output


def test_object_storage_is_written_and_left_as_it_was(moto_bucket, data, tmp_path, monkeypatch):
    url, options = moto_bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options.endpoint)
    monkeypatch.setenv("COLUMNS", "600")
    for path in data.iterdir():
        open_storage(f"{url}/data", options).write(path.name, path)
    before = list(open_storage(url, options).names())
    config = write_config(tmp_path / "tiny.yaml", data)
    words = (str(config), "--set", f"data.url={url}/data", "--set", "storage.retry_seconds=0")
    code, found = doctor(*words, "--run-dir", f"{url}/runs/x", cwd=tmp_path)
    assert code == 0, found
    assert "keeps two writers apart" in found["run directory"][1]
    assert list(open_storage(url, options).names()) == before
    code, found = doctor(*words, "--run-dir", "s3://no-such-bucket-at-all/x", cwd=tmp_path)
    assert code == 3
    assert found["run directory"][0] == "wrong" and found["data"][0] == "ok"


def test_a_tracking_store_that_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    code, found = doctor(cwd=tmp_path)
    assert code == 0
    assert found["MLflow"][0] == "ok" and "answers" in found["MLflow"][1]


def definition(kind):
    with gzip.open(Path(os.environ["IMAML_CRDS"]) / crds.FILES[kind]) as packed:
        return yaml.load(packed, Loader=yaml.CSafeLoader)


def test_kuberay_is_looked_for_by_kubectl(tmp_path, monkeypatch):
    crds.validator("RayJob", "v1")  # skips where the definitions are absent
    if not any((Path(folder) / "kubectl").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("kubectl is not installed")
    mark, said = doctor(cwd=tmp_path)[1]["Kubernetes"]
    assert mark == "-" and said.startswith("no context is chosen | kubectl config use-context NAME")
    with KubeApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        code, found = doctor(cwd=tmp_path)
        assert code == 0, "no configuration needs it"
        assert found["Kubernetes"] == ("ok", "context stand-in")
        assert found["KubeRay"][0] == "-" and "install its operator" in found["KubeRay"][1]
        cluster, job = definition("RayCluster"), definition("RayJob")
        api.definitions = {"rayclusters.ray.io": cluster, "rayjobs.ray.io": job}
        assert doctor(cwd=tmp_path)[1]["KubeRay"] == (
            "ok",
            "rayclusters.ray.io v1/v1alpha1, rayjobs.ray.io v1/v1alpha1",
        )
        for version in job["spec"]["versions"]:
            spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
            spec.pop("preRunningDeadlineSeconds", None)
        assert "upgrade the operator" in doctor(cwd=tmp_path)[1]["KubeRay"][1]
