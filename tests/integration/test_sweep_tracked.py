"""A sweep as a real MLflow server has it: the run above its trials, every point once, and how each of them ended."""

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers.command import imaml
from helpers.mlflow_server import MlflowServer, points
from helpers.sweeps import base, leaderboard, write_sweep
from mlflow import MlflowClient

from imaml_dist.tracking import metrics_file

STEPS, GRACE, CRASHES_AFTER = 40, 6, 5

NETWORKS = f"""
import json, os, sys, time
from pathlib import Path
from torch import nn


class Blind(nn.Sequential):
    '''Sees nothing but a corner, and takes its time in a trial: it is being trained when it is stopped.'''
    def __init__(self, way):
        super().__init__(nn.Flatten(), nn.Linear(1, way))
        self.run = Path(sys.argv[4]) if sys.argv[0].endswith("trial.py") else None
    def forward(self, x):
        if self.run:
            time.sleep(0.02)
        return super().forward(x[..., :1, :1])


class Crashing(Blind):
    '''Ends its process, however often it is started, when its run has come to {CRASHES_AFTER} meta-steps and MLflow has heard of all.'''
    def forward(self, x):
        if self.run and self.is_trained() and lines(self.run / "metrics.jsonl") >= {CRASHES_AFTER}:
            while json.loads((self.run / "mlflow.json").read_text())["last_step"] < {CRASHES_AFTER} - 1:
                time.sleep(0.05)
            os._exit(7)
        return super().forward(x)
    def is_trained(self):
        starts = self.run / "starts.jsonl"
        return starts.is_file() and f"[{{os.getpid()}}]" in starts.read_text()


def lines(file):
    return file.read_text().count(chr(10)) if file.is_file() else 0


def blind(image_shape, way):
    return Blind(way)


def crashing(image_shape, way):
    return Crashing(way)
"""


@pytest.mark.slow  # one of a trial and its parent is in `test_mlflow`
def test_a_server_has_the_sweep_above_its_trials_every_point_once_and_how_each_ended(data, tmp_path):
    """One trial is finished; one crashes for good, and before that does a meta-step again which the server knows; one is stopped."""
    (tmp_path / "mine.py").write_text(NETWORKS)
    kinds = [{"kind": "conv4", "channels": 2}, {"kind": "mine:crashing"}, {"kind": "mine:blind"}]
    path = write_sweep(
        tmp_path,
        data,
        base=base(data, STEPS) | {"tracking": {"system_every": 0.1}},
        space={"model": {"kind": "grid", "values": kinds}},
        searcher={"kind": "grid"},
        scheduler={"kind": "median", "grace": GRACE, "min_trials": 1},
        budget={},
    )
    sweep = tmp_path / "sweep"
    with MlflowServer(tmp_path) as server:
        env = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
        code, output = imaml("sweep", str(path), "--sweep-dir", "sweep", cwd=tmp_path, **env)
        assert code == 0 and "did not take everything" not in output, output
        assert [row["status"] for row in leaderboard(sweep)] == ["finished", "failed", "stopped"], output
        client = MlflowClient(tracking_uri=server.uri)
        experiment = client.get_experiment_by_name("tiny")  # that of the problem
        runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
        check_parent(client, runs.pop(id_of(sweep)), sweep)
        children = [runs.pop(id_of(sweep / "trials" / f"{number:04d}")) for number in range(3)]
        assert runs == {}
        assert [child.info.status for child in children] == ["FINISHED", "FAILED", "KILLED"]
        for number, child in enumerate(children):
            check_child(server.uri, child, sweep, number)


def id_of(folder: Path) -> str:
    return json.loads((folder / "mlflow.json").read_text())["run_id"]


def check_parent(client: MlflowClient, parent, sweep: Path) -> None:
    found = json.loads((sweep / "sweep.json").read_text())
    assert parent.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in parent.data.tags
    assert (parent.info.run_name, parent.data.tags["kind"]) == ("sweep", "sweep")
    assert parent.data.params["scheduler.grace"] == str(GRACE)
    assert parent.data.metrics["best/val_accuracy"] == found["trials"][found["best"]]["accuracy"]
    assert parent.data.metrics["test/accuracy"] == found["test"]["accuracy"]
    assert [parent.data.metrics[f"trials/{how}"] for how in ("finished", "stopped", "failed")] == [1, 1, 1]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"sweep.yaml", "sweep.json", "best.yaml", "report.html", "ledger.jsonl"}


def check_child(uri: str, child, sweep: Path, number: int) -> None:
    """Who it is, and that each number on record is one point, and each point a number on record."""
    tags, run = child.data.tags, sweep / "trials" / f"{number:04d}"
    starts = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert tags["mlflow.parentRunId"] == id_of(sweep)
    assert (child.info.run_name, tags["run_directory"]) == (f"sweep-{number:04d}", str(run))
    assert (tags["resume_count"], starts) == (("1", [0, 4]) if number == 1 else ("0", [0]))
    records = metrics_file.read(run / "metrics.jsonl")
    steps = [record["step"] for record in records]
    assert steps == list(range(len(steps)))
    assert {0: len(steps) == STEPS, 1: len(steps) == CRASHES_AFTER, 2: GRACE <= len(steps) < STEPS}[number], steps
    again = set(starts[1:])  # the server has the first time's seconds, the file the second's
    recorded = Counter(
        (record["step"], float(value))
        for record in records
        for name, value in record.items()
        if name not in ("step", "time") and record["step"] not in again and value is not None
    )
    assert len(recorded) > 10 * len(steps)
    known = {key: points(uri, child.info.run_id, key) for key in child.data.metrics}
    assert Counter(point for history in known.values() for point in history if point[0] not in again) == recorded
    for key, history in known.items():
        assert len({step for step, _ in history}) == len(history), key
    for key, name in (("meta/loss", "meta_loss"), ("cg/residual", "cg_residual"), ("val/accuracy", "val_accuracy")):
        assert known[key] == [(record["step"], record[name]) for record in records if name in record], key
    assert any(key.startswith("system/") for key in known)
