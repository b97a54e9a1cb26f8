"""MLflow runs against a real sqlite store and a real server that goes away and comes back."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers.gloo import free_port

from imaml_dist.errors import TrackingError
from imaml_dist.storage.local import without_secrets
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.mlflow_run import MlflowRun, RunFacts

FACTS = RunFacts(
    experiment="problem",
    name="a-run",
    params={"algorithm.lam": 0.1, **{f"many.p{i}": i for i in range(149)}, "odd?name": 1},
    tags={"git_commit": "abc"},
    dataset={"name": "blobs", "digest": "f" * 64, "source": "data/blobs"},
    dataset_tags={"n_way": "5"},
)


def record(step):
    return {
        "step": step,
        "time": 1.7e9 + step,
        "meta_loss": 1.0 / (step + 1),
        "cg_residual": None,
        "seconds_inner": 0.5,
        "accepted": 16,
        "updates": step + 1,
        "algorithm_rates.0.weight[é]_median": 0.1,
    }


def write(path, steps):
    for step in steps:
        metrics_file.append(path, record(step))


def history(client, run_id, key):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    return folder


def test_sqlite_beside_the_run_holds_everything_a_user_looks_for(run):
    import mlflow

    metrics, artifact = run / "metrics.jsonl", run / "report.html"
    artifact.write_text("<p>report</p>")
    tracker = MlflowRun(run, metrics, FACTS)
    tracker.start()
    write(metrics, range(300))
    tracker.close("FINISHED", [artifact, run / "missing"], {"test/accuracy": 0.9}, {"resume_count": "0"})

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    run_id = tracker.identity["run_id"]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a-run"
    assert client.get_experiment(found.info.experiment_id).name == "problem"
    assert len(found.data.params) == 151
    assert found.data.params["algorithm.lam"] == "0.1"
    assert found.data.tags["git_commit"] == "abc"
    assert found.data.tags["dataset_fingerprint"] == "f" * 64
    assert found.data.metrics["test/accuracy"] == 0.9
    assert history(client, run_id, "meta/loss") == [(s, 1.0 / (s + 1)) for s in range(300)]
    assert len(history(client, run_id, "time/inner")) == 300
    assert len(history(client, run_id, "outcome/accepted")) == 300
    assert len(history(client, run_id, "meta/updates")) == 300
    (learned,) = [key for key in found.data.metrics if key.startswith("algorithm/")]
    assert learned.startswith("algorithm/rates.0.weight_") and learned.endswith("_median")
    assert found.inputs.dataset_inputs[0].dataset.name == "blobs"
    assert [a.path for a in client.list_artifacts(run_id)] == ["report.html"]
    assert (run.parent / "mlartifacts" / "problem").is_dir()


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_with_every_step_once(run):
    import mlflow

    metrics = run / "metrics.jsonl"
    write(metrics, range(5))
    first = MlflowRun(run, metrics, FACTS)
    first.close("KILLED")
    metrics_file.rewind(metrics, 3)
    write(metrics, range(3, 8))
    second = MlflowRun(run, metrics, FACTS)
    second.close("FINISHED")
    assert first.identity == second.identity
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    assert [s for s, _ in history(client, second.identity["run_id"], "meta/loss")] == list(range(8))
    assert client.get_run(second.identity["run_id"]).info.status == "FINISHED"


class Server:
    """A real `mlflow server` on the loopback address."""

    def __init__(self, folder, port):
        self.uri = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{folder / 'server.db'}",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "mlflow server does not start"
                time.sleep(0.2)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_server_that_goes_away_loses_nothing_and_delays_nobody(run, tmp_path, monkeypatch):
    import mlflow

    port = free_port()
    server = Server(tmp_path, port)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        metrics = run / "metrics.jsonl"
        tracker = MlflowRun(run, metrics, FACTS)
        tracker.start()
        write(metrics, range(20))
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        deadline = time.monotonic() + 60
        while tracker.identity is None or len(history(client, tracker.identity["run_id"], "meta/loss")) < 20:
            assert time.monotonic() < deadline, tracker.trouble
            time.sleep(0.2)
        server.kill()
        write(metrics, range(20, 50))
        with pytest.raises(TrackingError, match=r"nothing is lost.*imaml mlflow-sync"):
            tracker.close("FINISHED", timeout=3)

        server = Server(tmp_path, port)
        again = MlflowRun(run, metrics, FACTS)
        again.close("FINISHED")
        assert again.identity == tracker.identity
        assert [s for s, _ in history(client, again.identity["run_id"], "meta/loss")] == list(range(50))
    finally:
        server.kill()


def test_passwords_in_the_address_are_not_written_down(run, monkeypatch):
    assert without_secrets("https://user:canary@host:8080/x") == "https://host:8080/x"
    assert without_secrets("sqlite:////a/b.db") == "sqlite:////a/b.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9")
    tracker = MlflowRun(run, run / "metrics.jsonl", FACTS)
    with pytest.raises(TrackingError) as caught:
        tracker.close("FINISHED", timeout=1)
    assert "canary" not in str(caught.value)
    assert "canary" not in "".join(p.read_text() for p in run.iterdir())
