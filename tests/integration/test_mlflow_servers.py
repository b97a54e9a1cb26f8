"""`mlflow server` as it is run for a team: PostgreSQL, artifacts in S3 through the server, a list of hosts, users with passwords."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import new_bucket
from helpers import s3_server
from helpers.command import imaml, imaml_here
from helpers.fault_proxy import Fault, FaultProxy
from helpers.mlflow_server import MlflowServer, points, postgres
from helpers.runs import write_config

CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "canary-canary"}


def train(folder, data, uri, monkeypatch, **env):
    """A run of six steps whose only way to MLflow is this address; its summary."""
    write_config(folder / "tiny.yaml", data)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "60"
    )  # the server, its database and S3 share two cores with other tests
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    words = ("--run-dir", "run", "--set", "tracking={register: served}")
    code, output = imaml_here("train", "tiny.yaml", *words, cwd=folder)
    assert code == 0 and "did not take everything" not in output, output
    return json.loads((folder / "run" / "summary.json").read_text())


def answered(asked):
    """The status of an answer."""
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def artifacts(uri, run_id, below=""):
    import mlflow

    return {a.path for a in mlflow.MlflowClient(tracking_uri=uri).list_artifacts(run_id, below)}


@pytest.mark.slow
def test_postgres_and_artifacts_in_s3_through_the_server(data, tmp_path, moto, aws, monkeypatch):
    """The client has no credentials for the bucket: the server has."""
    url, _ = new_bucket(moto)
    with postgres(tmp_path) as database:
        options = ("--backend-store-uri", database, "--artifacts-destination", f"{url}/mlflow")
        keys = {"MLFLOW_S3_ENDPOINT_URL": moto, **s3_server.environment(home=tmp_path)}
        with MlflowServer(tmp_path, *options, **keys) as server:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
            run_id = train(tmp_path, data, server.uri, monkeypatch)["mlflow"]["run_id"]
            assert [step for step, _ in points(server.uri, run_id, "meta/loss")] == list(range(6))
            assert {"config.yaml", "report.html", "figures"} <= artifacts(server.uri, run_id)
            import mlflow

            client = mlflow.MlflowClient(tracking_uri=server.uri)
            assert client.get_model_version_by_alias("served", "champion").tags["test_accuracy"]
            (tmp_path / "back").mkdir()
            back = client.download_artifacts(run_id, "report.html", str(tmp_path / "back"))
            assert Path(back).read_text() == (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.slow
def test_a_host_that_is_not_on_the_list_is_refused(data, tmp_path, monkeypatch):
    with MlflowServer(tmp_path, "--allowed-hosts", "mlflow,mlflow:5000,127.0.0.1:*") as server:
        for host, code in (("mlflow:5000", 200), ("mlflow.elsewhere", 403)):
            asked = urllib.request.Request(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1")
            asked.add_header("Host", host)
            assert answered(asked) == code, host
        run_id = train(tmp_path, data, server.uri, monkeypatch)["mlflow"]["run_id"]
        assert [step for step, _ in points(server.uri, run_id, "meta/loss")] == list(range(6))


@pytest.mark.slow
def test_users_with_passwords_that_come_from_the_environment_alone(data, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed (mlflow[auth])")
    secret = {"MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(16).hex(), "MLFLOW_AUTH_ADMIN_PASSWORD": "canary-canary"}
    with MlflowServer(tmp_path, "--app-name", "basic-auth", **secret) as server:
        write_config(tmp_path / "tiny.yaml", data)
        words = ("train", "tiny.yaml", "--run-dir", "run", "--set", "tracking.mlflow=true")
        code, output = imaml(*words, cwd=tmp_path, MLFLOW_TRACKING_URI=server.uri)
        assert code == 0 and "did not take everything" in output and "mlflow-sync" in output, output

        code, output = imaml("mlflow-sync", "run", cwd=tmp_path, MLFLOW_TRACKING_URI=server.uri, **CREDENTIALS)
        assert code == 0, output
        run_id = json.loads((tmp_path / "run" / "summary.json").read_text())["mlflow"]["run_id"]
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        assert {"config.yaml", "report.html", "figures"} <= artifacts(server.uri, run_id)
        for path in (tmp_path / "run").rglob("*"):
            assert not path.is_file() or b"canary" not in path.read_bytes(), path
        assert "canary" not in output


@pytest.mark.slow
def test_a_server_that_takes_seven_seconds_to_answer_is_waited_for_when_nothing_else_waits(data, tmp_path):
    slow = float("inf")

    def slowly():
        nonlocal slow
        if slow > 0:
            slow -= 1
            time.sleep(7.0)

    write_config(tmp_path / "tiny.yaml", data)
    words = ("train", "tiny.yaml", "--run-dir", "run", "--set", "tracking.mlflow=true")
    with MlflowServer(tmp_path) as server, FaultProxy(server.uri, Fault("call", action=slowly)) as proxy:
        code, output = imaml(*words, cwd=tmp_path, MLFLOW_TRACKING_URI=proxy.url)
        assert code == 0 and "did not take everything" in output, output
        slow = 4  # more tries of five seconds than anyone makes
        code, output = imaml("mlflow-sync", "run", cwd=tmp_path, MLFLOW_TRACKING_URI=proxy.url)
        assert code == 0 and slow < 4, output
        run_id = json.loads((tmp_path / "run" / "summary.json").read_text())["mlflow"]["run_id"]
        assert [step for step, _ in points(server.uri, run_id, "meta/loss")] == list(range(6))
