"""MLflow runs against a real sqlite store and a real server that goes away and comes back."""

import json
import socket
import time
from dataclasses import replace

import pytest
from helpers.command import Command, imaml, imaml_here, wait_for_step
from helpers.fault_proxy import Fault, FaultProxy
from helpers.mlflow_server import MlflowServer, points
from helpers.runs import write_config

from imaml_dist.errors import TrackingError
from imaml_dist.storage.local import without_secrets
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.mlflow_link import RunFacts, default_uri, home_of
from imaml_dist.tracking.mlflow_parent import MlflowParent
from imaml_dist.tracking.mlflow_run import MlflowRun
from imaml_dist.training.checkpoints import set_aside_after
from imaml_dist.training.run_directory import RunDirectory

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
        "system/node-1/cpu_utilization_percentage": 50.0,
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
    assert len(history(client, run_id, "system/node-1/cpu_utilization_percentage")) == 300
    assert history(client, run_id, "test/accuracy") == [(299, 0.9)]
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


@pytest.mark.parametrize("arrived", [True, False])
def test_a_process_that_is_killed_while_it_sends_doubles_and_loses_nothing(run, monkeypatch, arrived):
    """The next one does some steps again, at other times; whether the batch had arrived only MLflow knows."""
    import mlflow

    metrics = run / "metrics.jsonl"
    write(metrics, range(5))
    MlflowRun(run, metrics, FACTS).close("KILLED")
    write(metrics, range(5, 10))
    killed = MlflowRun(run, metrics, FACTS)
    real = mlflow.MlflowClient.log_batch

    def log_batch(self, run_id, metrics=(), **more):
        if arrived or not metrics:
            real(self, run_id, metrics=metrics, **more)
        if metrics:
            raise KeyboardInterrupt  # which nothing of ours answers, as SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
        with pytest.raises(KeyboardInterrupt):
            killed._send()
    metrics_file.rewind(metrics, 7)
    for step in range(7, 12):
        metrics_file.append(metrics, record(step) | {"time": 1.8e9 + step})
    last = MlflowRun(run, metrics, FACTS)
    last.close("FINISHED")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    for name in ("meta/loss", "time/inner", "system/node-1/cpu_utilization_percentage"):
        assert [step for step, _ in history(client, last.identity["run_id"], name)] == list(range(12))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


def test_answers_that_are_lost_double_nothing(run, server, monkeypatch):
    import mlflow

    write(run / "metrics.jsonl", range(200))
    with FaultProxy(server.uri, Fault("lose", on="POST", every=2, times=6)) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        tracker = MlflowRun(run, run / "metrics.jsonl", replace(FACTS, experiment="lost"))
        tracker.close("FINISHED", results={"test/accuracy": 0.9}, timeout=60)
        assert proxy.counts["lose"] == 6
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("lost").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.run_id == tracker.identity["run_id"]
    for key in ("meta/loss", "time/inner", "meta/updates"):
        assert [s for s, _ in points(server.uri, found.info.run_id, key)] == list(range(200)), key
    assert points(server.uri, found.info.run_id, "test/accuracy") == [(199, 0.9)]


def test_children_know_their_parent_also_those_that_began_without_it(run, server, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    sweep = run.parent / "sweep"
    children = [sweep / "trials" / name for name in ("early", "late", "never-sent")]
    for child in children:
        child.mkdir(parents=True)
    facts = RunFacts("sweeps", "sweep", {"searcher": "random"}, {"kind": "sweep"})
    orphan = MlflowRun(children[0], children[0] / "metrics.jsonl", replace(FACTS, experiment="sweeps"))
    orphan.close("KILLED")
    parent = MlflowParent(sweep, facts)
    assert parent.run_id is None
    parent_id = parent.begin()
    child = replace(FACTS, experiment="sweeps", parent=parent_id)
    write(children[1] / "metrics.jsonl", range(3))
    MlflowRun(children[1], children[1] / "metrics.jsonl", child).close("FINISHED")
    (sweep / "sweep.json").write_text("{}")
    for _ in range(2):  # as when the same command is run again
        parent = MlflowParent(sweep, facts)
        assert parent.begin() == parent_id
        parent.close("FINISHED", children, {"best": 0.9}, {"best_trial": "late"}, [sweep / "sweep.json"])

    client = mlflow.MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    found = {r.info.run_id: r for r in client.search_runs([experiment])}
    assert len(found) == 3
    top = found.pop(parent_id)
    assert (top.info.status, top.data.params["searcher"], top.data.tags["best_trial"]) == ("FINISHED", "random", "late")
    assert points(server.uri, parent_id, "best") == [(0, 0.9)]
    assert {r.data.tags["mlflow.parentRunId"] for r in found.values()} == {parent_id}
    assert sorted(r.info.status for r in found.values()) == ["FINISHED", "KILLED"]


def test_runs_within_another_go_to_its_store(run):
    sweep = run.parent / "sweep"
    (sweep / "trials" / "one").mkdir(parents=True)
    assert home_of(sweep / "trials" / "one") == sweep.resolve() / "trials"
    MlflowParent(sweep, RunFacts("sweeps", "sweep", {}, {}))
    assert home_of(sweep / "trials" / "one") == home_of(sweep) == run.parent.resolve()
    assert default_uri(home_of(sweep)) == f"sqlite:///{run.parent.resolve()}/mlflow.db"


def test_what_a_resumed_run_changed_becomes_tags(run):
    import mlflow

    MlflowRun(run, run / "metrics.jsonl", FACTS).close("KILLED")
    later = replace(FACTS, params={**FACTS.params, "algorithm.lam": 0.2}, tags={"git_commit": "def"})
    second = MlflowRun(run, run / "metrics.jsonl", later)
    second.close("FINISHED")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    found = client.get_run(second.identity["run_id"]).data
    assert found.params["algorithm.lam"] == "0.1"
    assert (found.tags["now.algorithm.lam"], found.tags["git_commit"]) == ("0.2", "def")


@pytest.mark.slow  # a whole run without its server, below, is one of make test
def test_what_a_later_start_changed_back_is_no_longer_said_to_be_changed(run):
    import mlflow

    for lam in (0.1, 0.2, 0.1):
        tracker = MlflowRun(run, run / "metrics.jsonl", replace(FACTS, params={"algorithm.lam": lam}))
        tracker.close("KILLED")
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
        found = client.get_run(tracker.identity["run_id"]).data
        assert found.tags.get("now.algorithm.lam", found.params["algorithm.lam"]) == str(lam)


def test_whatever_an_experiment_is_called_its_files_lie_beside_the_database(run):
    names = ["problem", f"{run.parent}/outside", "../x", "..", "a/b", "a_b", "a" * 400]
    for number, name in enumerate(names):
        folder = run.parent / str(number)
        folder.mkdir()
        (folder / "report.html").write_text("<p>report</p>")
        MlflowRun(folder, folder / "metrics.jsonl", replace(FACTS, experiment=name)).close(
            "FINISHED", [folder / "report.html"]
        )
    kept = run.parent / "mlartifacts"
    assert len(list(kept.iterdir())) == len(names) == len(list(kept.glob("*/*/artifacts/report.html")))
    assert not (run.parent / "outside").exists() and not (run.parent / "x").exists()
    assert (kept / "problem").is_dir() and (kept / "a_b").is_dir(), "as they are called, where that can be"


def test_a_server_that_goes_away_loses_nothing_and_delays_nobody(run, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    metrics = run / "metrics.jsonl"
    tracker = MlflowRun(run, metrics, FACTS)
    tracker.start()
    write(metrics, range(20))
    wait_until(lambda: known(run) and len(points(server.uri, known(run), "meta/loss")) == 20)
    server.kill()
    write(metrics, range(20, 50))
    with pytest.raises(TrackingError, match=r"nothing is lost.*imaml mlflow-sync"):
        tracker.close("FAILED", timeout=2)

    server.start()
    again = MlflowRun(run, metrics, FACTS)
    assert again.intended == "FAILED"
    again.close("FAILED")
    assert again.identity == tracker.identity
    assert [s for s, _ in points(server.uri, again.identity["run_id"], "meta/loss")] == list(range(50))


def test_a_run_outlives_its_server_and_then_itself(server, data, tmp_path):
    """Killed without its server, settled by hand, resumed from an older step: every metric of every step once, and the right end."""
    import mlflow

    write_config(tmp_path / "tiny.yaml", data, checkpoint_every=40)
    run, client = tmp_path / "run", mlflow.MlflowClient(tracking_uri=server.uri)
    words = ("train", "tiny.yaml", "--run-dir", "run", "--set", "tracking={experiment: outlived, system_every: 0.1}")
    with Command(*words, "--set", "run.steps=100000", cwd=tmp_path, MLFLOW_TRACKING_URI=server.uri) as command:
        wait_for_step(run / "metrics.jsonl", 3, command)
        wait_until(lambda: known(run) and points(server.uri, known(run), "meta/loss"))
        run_id = known(run)
        assert imaml_here("mlflow-sync", str(run), cwd=tmp_path)[0] == 2  # it is being trained
        server.kill()
        wait_for_step(run / "metrics.jsonl", steps_of(run) + 50, command)
        command.kill()
    server.start()
    assert client.get_run(run_id).info.status == "RUNNING"
    code, output = imaml("mlflow-sync", "run", cwd=tmp_path, MLFLOW_TRACKING_URI=server.uri)
    assert code == 0 and "KILLED" in output, output
    assert client.get_run(run_id).info.status == "KILLED"
    reached = steps_of(run)
    assert [s for s, _ in points(server.uri, run_id, "meta/loss")] == list(range(reached))
    set_aside_after(RunDirectory(run).checkpoints, reached - 1)  # killed right after one, it would do no step twice

    more = ("--set", f"run.steps={reached + 5}")
    code, output = imaml(*words, *more, cwd=tmp_path, MLFLOW_TRACKING_URI=server.uri)
    assert code == 0 and "did not take everything" not in output, output
    first, second = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    assert first["step"] == 0 < second["step"] < reached  # some steps were done twice
    found = client.get_run(run_id)
    assert (found.info.status, found.data.tags["resume_count"]) == ("FINISHED", "1")
    records = metrics_file.read(run / "metrics.jsonl")
    assert len(records) == reached + 5
    for name, key in (("meta/loss", "meta_loss"), ("cg/residual", "cg_residual"), ("val/accuracy", "val_accuracy")):
        expected = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        assert points(server.uri, run_id, name) == expected, name
    for name in ("time/step", "outcome/accepted", "tasks_per_second"):
        assert [s for s, _ in points(server.uri, run_id, name)] == list(range(reached + 5)), name
    (busy,) = [key for key in found.data.metrics if key.endswith("/cpu_utilization_percentage")]
    assert busy == f"system/{socket.gethostname()}/cpu_utilization_percentage"
    assert 0 <= found.data.metrics[busy] <= 100


def known(run):
    """The id of a run's MLflow run; empty while there is none."""
    file = run / "mlflow.json"
    return json.loads(file.read_text())["run_id"] if file.is_file() else ""


def steps_of(run):
    return metrics_file.reached(run / "metrics.jsonl")


def wait_until(holds, timeout=120):
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_passwords_in_the_address_are_not_written_down(run, monkeypatch):
    assert without_secrets("https://user:canary@host:8080/x") == "https://host:8080/x"
    for kept in (
        "sqlite:////a/b.db",
        "http://host:5000/a@b",
        "s3://bucket/a?x=1",
        "a/path@home",
        "http://host/x@y?z#@",
    ):
        assert without_secrets(kept) == kept
    assert without_secrets("postgresql+psycopg2://u:ca/na#ry@h/db") == "postgresql+psycopg2://h/db"
    assert (
        without_secrets("postgresql://h/db?user=u&password=canary&x=1") == "postgresql://h/db?user=u&password=***&x=1"
    )
    assert without_secrets("https://u:can/ary@h/x") == "https://h/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9")
    tracker = MlflowRun(run, run / "metrics.jsonl", FACTS)
    with pytest.raises(TrackingError) as caught:
        tracker.close("FINISHED", timeout=1)
    assert "canary" not in str(caught.value)
    assert "canary" not in "".join(p.read_text() for p in run.iterdir())
