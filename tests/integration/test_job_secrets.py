"""Secrets of a job: those of its cluster's nodes and those of who submits it are used, and are nowhere in what is written down."""

import os
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import s3_server
from helpers.command import imaml_here
from helpers.gloo import free_port
from helpers.manifests import IMAGE
from helpers.mlflow_server import MlflowServer
from helpers.ray_cluster import ray_cluster
from helpers.runs import raw_config

from imaml_dist.storage.opening import open_storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NODES = {
    "AWS_ACCESS_KEY_ID": "CANARY-NODE-KEY-ID-1f0a",
    "AWS_SECRET_ACCESS_KEY": "CANARY-NODE-SECRET-KEY-2b1c",
    "AWS_SESSION_TOKEN": "CANARY-NODE-SESSION-9e8d",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "CANARY-NODE-PASSWORD-4d3e",
}
"""What Kubernetes puts into the pods of Secrets."""

USER = {
    "AWS_ACCESS_KEY_ID": "CANARY-USER-KEY-ID-77f1",
    "AWS_SECRET_ACCESS_KEY": "CANARY-USER-SECRET-KEY-3a9c",
    "MLFLOW_TRACKING_PASSWORD": "CANARY-USER-PASSWORD-51d0",
    "GITHUB_TOKEN": "CANARY-USER-GITHUB-6c5b",
}
"""In the environment of whoever submits."""


def hits(secrets, texts):
    """(secret, where) for each secret that is in a text; archives are looked into."""
    found, looked_at = [], 0
    for where, content in texts:
        looked_at += 1
        found += [(secret, where) for secret in secrets if secret.encode() in content]
    assert looked_at, "nothing was looked at"
    return found


def files_of(*folders):
    for folder in folders:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            yield str(path), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((f"{path}:{name}", archive.read(name)) for name in archive.namelist())


def test_what_looks_for_secrets_finds_one(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\xffCANARY-1")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", "CANARY-2 " * 99)
    found = hits(("CANARY-1", "CANARY-2", "CANARY-3"), files_of(tmp_path))
    assert set(found) == {("CANARY-1", str(tmp_path / "a")), ("CANARY-2", f"{tmp_path / 'b.zip'}:inner")}


@pytest.fixture
def mlflow_server(tmp_path):
    """A server that asks for the password of the nodes, and the folder of its databases and artifacts."""
    pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed (mlflow[auth])")
    folder = tmp_path / "mlflow"
    folder.mkdir()
    secret = {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(16).hex(),
        "MLFLOW_AUTH_ADMIN_PASSWORD": NODES["MLFLOW_TRACKING_PASSWORD"],
    }
    with MlflowServer(folder, "--app-name", "basic-auth", **secret) as server:
        yield server.uri, folder


def test_a_job_uses_secrets_and_writes_none_down(data, moto_bucket, mlflow_server, tmp_path, monkeypatch):
    """Data and run on S3, MLflow with a password, Ray with a token: manifest, job, logs, what travels, run, MLflow."""
    url, options = moto_bucket
    storage, (mlflow_uri, tracked) = open_storage(url, options), mlflow_server
    for path in data.iterdir():
        storage.write(path.name, path)
    work = tmp_path / "work"
    work.mkdir()
    raw = raw_config(url, backend="ray", workers=2, device="cpu")
    raw |= {"storage": {"endpoint": options.endpoint}, "tracking": {"mlflow": True, "register": "served"}}
    (work / "tiny.yaml").write_text(yaml.safe_dump(raw))
    (work / ".env").write_text("A_KEY=CANARY-USER-IN-A-FILE")
    port, run = free_port(), f"{url}/runs/tiny"
    nodes = {
        **NODES,
        **{k: v for k, v in s3_server.environment(home=tmp_path).items() if k not in NODES},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "IMAML_CACHE": str(tmp_path / "cache"),
        "IMAML_KERNELS": os.environ["IMAML_KERNELS"],
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # its server shares two cores with other tests
    }
    with ray_cluster(2, dashboard=port, **nodes) as cluster:
        token, dashboard = cluster.env["RAY_AUTH_TOKEN"], f"http://127.0.0.1:{port}"
        user = {**USER, "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": mlflow_uri}
        secrets = (*NODES.values(), *USER.values(), "CANARY-USER-IN-A-FILE", token)
        secrets = tuple(secret for secret in secrets if secret != NODES["MLFLOW_TRACKING_USERNAME"])
        for name, value in user.items():
            monkeypatch.setenv(name, value)
        submit = ("submit", "tiny.yaml", "--run-dir", run)
        code, manifest = imaml_here(*submit, "--k8s", "--dry-run", "--image", IMAGE, cwd=work)
        assert code == 0 and "kind: RayJob" in manifest, manifest
        code, output = imaml_here(*submit, "--address", dashboard, "--id", "tiny", cwd=work)
        assert code == 0 and "did not take everything" not in output, output
        said = {}
        for verb in ("list", "status", "logs"):
            words = ("jobs", verb, *(() if verb == "list" else ("tiny",)), "--address", dashboard)
            code, said[verb] = imaml_here(*words, cwd=work)
            assert code == 0, said[verb]
        request = urllib.request.Request(f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            said["the job's description, runtime_env and all"] = answer.read().decode()
        assert '"runtime_env"' in said["the job's description, runtime_env and all"]
        said |= {"the manifest": manifest, "the output": output}
        assert hits(secrets, ((where, text.encode()) for where, text in said.items())) == []
        logs = list(cluster.folder.rglob("*.*"))
        assert any(log.name.startswith("job-driver") for log in logs) and any(log.name == "raylet.out" for log in logs)
        assert hits(secrets, files_of(cluster.folder)) == []
    objects = [(name, storage.read(name)) for name, _ in storage.names("runs/")]
    assert {"runs/tiny/config.yaml", "runs/tiny/summary.json"} <= {name for name, _ in objects}
    assert hits(secrets, objects) == []
    assert (tracked / "server.db").is_file() and list((tracked / "artifacts").rglob("MLmodel"))
    assert hits(secrets, files_of(tracked, work / "tiny.yaml", tmp_path / "cache")) == []
