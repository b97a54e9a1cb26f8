"""MLflow as its pod would run: the manifest's own commands and environment, against a real PostgreSQL that wants a password."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.gloo import free_port
from helpers.manifests import documents

pytestmark = pytest.mark.slow

SECRETS = {
    "PGPASSWORD": "of-this-test",
    "IMAML_BUCKET": "imaml",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture
def database(tmp_path):
    """Port of a PostgreSQL, with the user and the database of the platform."""
    psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is not installed, which the extra `server` brings")
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    programs, port, data = Path(found).parent, free_port(), tmp_path / "postgres"
    data.mkdir()
    password = tmp_path / "password"
    password.write_text(SECRETS["PGPASSWORD"])
    other = []
    if os.getuid() == 0:  # whom PostgreSQL refuses
        other = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        for above in (tmp_path, *tmp_path.parents[:2]):
            above.chmod(above.stat().st_mode | 0o011)
        password.chmod(0o644)
        shutil.chown(data, "nobody", "nogroup")
    make = [
        *other,
        programs / "initdb",
        "-D",
        data,
        "-U",
        "mlflow",
        "--auth=scram-sha-256",
        f"--pwfile={password}",
        "--no-sync",
    ]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd="/")
    start = [*other, programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
    with subprocess.Popen(start, stderr=subprocess.DEVNULL, cwd="/") as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    connection = psycopg2.connect(
                        host="127.0.0.1", port=port, user="mlflow", password=SECRETS["PGPASSWORD"], dbname="postgres"
                    )
                    break
                except psycopg2.OperationalError:
                    assert server.poll() is None and time.monotonic() < deadline
                    time.sleep(0.2)
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE mlflow")
            connection.close()
            yield port
        finally:
            server.send_signal(signal.SIGQUIT)


def of_this_machine(container, database, port, home):
    """A container's command and environment, with addresses of this machine and secrets of this test."""

    def here(text):
        return text.replace("@postgres:5432", f"@127.0.0.1:{database}").replace("$(IMAML_BUCKET)", "imaml")

    given = {v["name"]: v.get("value") or SECRETS.get(v["name"], "http://127.0.0.1:1") for v in container["env"]}
    command = [here(word).replace("0.0.0.0", "127.0.0.1").replace("5000", str(port)) for word in container["command"]]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return command, {**kept, "PATH": path, **{n: here(value) for n, value in given.items()}, "HOME": str(home)}


def asked(port, host):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.timeout(600)
def test_the_pod_of_mlflow_migrates_serves_and_knows_its_names(database, tmp_path):
    (pod,) = [
        d["spec"]["template"]["spec"]
        for d in documents("gpu")
        if d["metadata"]["name"] == "mlflow" and d["kind"] == "Deployment"
    ]
    port, nowhere = free_port(), tmp_path / "read-only"  # as a pod's file system is
    nowhere.mkdir()
    command, environment = of_this_machine(pod["initContainers"][0], database, port, tmp_path)
    for _ in range(2):  # no tables yet, and tables that are there
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=nowhere, check=False)
        assert done.returncode == 0, done.stderr
    command, environment = of_this_machine(pod["containers"][0], database, port, tmp_path)
    assert SECRETS["PGPASSWORD"] not in " ".join(command)
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=nowhere, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        assert [asked(port, host) for host in ("mlflow:5000", "localhost:5000", "mlflow.imaml.svc:5000")] == [200] * 3
        assert asked(port, "example.org") == 403
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert SECRETS["PGPASSWORD"] not in (tmp_path / "log").read_text()
    assert not list(nowhere.iterdir())
