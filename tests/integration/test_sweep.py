"""`imaml sweep` with real Ray: the trials' own training runs, kills of driver and trials, early stopping that leaves nothing behind."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command import Command, imaml, imaml_here
from helpers.ray_cluster import ray_cluster
from helpers.runs import raw_config
from helpers.sweeps import TRIALS, base, begun, leaderboard, ledger, wait_for, write_sweep
from mlflow import MlflowClient

from imaml_dist.config.load import build_config
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.data.frozen import freeze, publish
from imaml_dist.distributed.build import make_source, open_dataset, resolve
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.ray_tune import need_of
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import ConfigError
from imaml_dist.sweeps.directory import SweepDirectory
from imaml_dist.sweeps.drawing import draw
from imaml_dist.sweeps.search import measured
from imaml_dist.training.run_directory import RunDirectory
from pipelines import sweep
from pipelines.sweep_table import show_outcome

TIMES = ("seconds", "began", "ended", "losses")


def table(folder: Path) -> list[dict]:
    """The leaderboard without what a clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in leaderboard(folder)]


def trained_alone(path: Path, folder: Path) -> list[dict]:
    """What the table must be: every trial trained in this process, without sweep and Ray, on the same frozen tasks."""
    sweep, rows = load_sweep(path), []
    asked = sweep.base()
    dataset = open_dataset(asked)
    manifest = folder / "frozen.jsonl"
    publish(str(manifest), freeze(make_source(asked, dataset, "val"), sweep.config.validation.tasks))
    decided = [f"validate.tasks={sweep.config.validation.tasks}", f"validate.manifest={manifest}", "evaluate.tasks=0"]
    for number in range(sweep.config.budget.trials):
        values = draw(sweep.config, number)
        overrides = [*(f"{field}={value}" for field, value in values.items()), *decided]
        config = resolve(build_config(base(Path(asked.data.url), asked.run.steps), overrides), cuda=False)
        run = RunDirectory(folder / f"alone-{number}")
        run.begin(config)
        Worker(config, run, Alone()).run_to_end()
        found = vars(measured(run, config.run.tasks_per_step))
        found.pop("seconds")
        rows.append({"trial": number, "status": "finished", "values": values, **found, "why": ""})
    assert len({row["accuracy"] for row in rows}) > 1, "or the comparison would show nothing"
    return rows


def trainer(folder: Path, trial: int) -> int:
    """Process id of a trial of the local backend, or of rank 0 of one on Ray."""
    starts = (folder / "trials" / f"{trial:04d}" / "starts.jsonl").read_text().splitlines()
    return json.loads(starts[-1])["pids"][0]


def test_driver_and_trials_are_killed_and_the_table_is_that_of_trials_trained_alone(data, tmp_path):
    """On a cluster that stays, for it to have to free what a killed driver held."""
    path = write_sweep(tmp_path, data, steps=45)
    words, folder = ("sweep", str(path), "--sweep-dir", "sweep"), tmp_path / "sweep"
    with ray_cluster(nodes=2) as cluster:
        with Command(*words, cwd=tmp_path, **cluster.env) as command:
            wait_for(lambda: begun(folder, 1), command)
            os.kill(trainer(folder, 1), signal.SIGKILL)  # a trial's process
            wait_for(lambda: any(event["event"] == "lost" for event in ledger(folder)), command)
            wait_for(lambda: any(event["event"] == "ended" for event in ledger(folder)), command)
            command.kill()  # the driver
        check_resumed(words, folder, cluster.env)
    assert table(folder) == trained_alone(path, tmp_path)
    check_outcome(folder, tmp_path)


def check_resumed(words: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
    """The same command again ends the sweep; no trial is begun or ended twice, and none that had ended is trained again."""
    before = [event for event in ledger(folder) if event["event"] == "ended"]
    assert 1 <= len(before) < TRIALS
    code, output = imaml(*words, cwd=folder.parent, **env)
    assert code == 0, output
    events = ledger(folder)
    for number in range(TRIALS):
        assert sum(event["event"] == "ended" and event["trial"] == number for event in events) == 1
        assert sum(event["event"] == "begun" and event["trial"] == number for event in events) == 1
    for event in before:  # finished trials were not touched again
        starts = (folder / "trials" / f"{event['trial']:04d}" / "starts.jsonl").read_text().splitlines()
        assert len(starts) == 1 + (event["trial"] == 1)
    assert json.loads((folder / "sweep.json").read_text())["trials"][1]["losses"] == 1


def check_outcome(folder: Path, where: Path) -> None:
    """What a sweep leaves: the best configuration, its one test, and the page; shown again without training or testing again."""
    found = json.loads((folder / "sweep.json").read_text())
    rows = found["trials"]
    best = max(rows, key=lambda row: row["accuracy"])
    assert found["best"] == best["trial"]
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert config["algorithm"]["lam"] == best["values"]["algorithm.lam"]
    assert (config["validate"]["manifest"], config["evaluate"]["tasks"]) == (None, 20)
    assert (found["test"]["trial"], found["test"]["tasks"]) == (best["trial"], 20)
    assert (folder / "report.html").read_text().count("<svg") >= 4
    assert not (folder / "ray").exists()
    (folder / "trials" / f"{best['trial']:04d}" / "checkpoints").rename(
        where / "away"
    )  # so that a second test would fail
    code, output = imaml("sweep", str(where / "sweep.yaml"), "--sweep-dir", str(folder), cwd=where)
    assert code == 0 and "best: trial" in output, output
    (where / "away").rename(folder / "trials" / f"{best['trial']:04d}" / "checkpoints")
    assert json.loads((folder / "sweep.json").read_text()) == found


@pytest.mark.slow
def test_a_killed_ray_worker_of_a_trial_changes_nothing_in_the_table(data, tmp_path):
    """Which the trial's own command replaces: to the sweep the trial was never lost."""
    on_ray = {"run.backend": "ray", "run.workers": 2}
    path, folder = write_sweep(tmp_path, data, steps=45, set=on_ray, budget={"trials": 2}), tmp_path / "sweep"
    with Command("sweep", str(path), "--sweep-dir", "sweep", cwd=tmp_path) as command:
        wait_for(lambda: begun(folder, 0), command)
        os.kill(trainer(folder, 0), signal.SIGKILL)
        assert command.wait() == 0, command.output
    starts = [json.loads(line) for line in (folder / "trials" / "0000" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and starts[1]["after"]
    assert [event["event"] for event in ledger(folder)] == ["begun", "ended"] * 2
    assert table(folder) == trained_alone(path, tmp_path)


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("space.algorithm.lamda={kind: uniform, low: 1.0, high: 2.0}", 2, "did you mean algorithm.lam?"),
        ("space.data.shot={kind: int, low: 1, high: 900}", 2, "data.shot"),
        ("space.model={kind: choice, values: [{kind: mlp}, {kind: 'no.such:net'}]}", 2, "no.such:net"),
        ("validation.tasks=0", 2, "validation.tasks: 0 given"),
        ("base.data.url=nowhere", 2, "nowhere"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_sentence_before_anything_starts(data, tmp_path, override, code, says):
    path = write_sweep(tmp_path, data)
    found, output = imaml_here("sweep", str(path), "--sweep-dir", "sweep", "--set", override, cwd=tmp_path)
    assert (found, says in output, len(output.strip().splitlines())) == (code, True, 1), output
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_head_without_a_gpu_prepares_trials_that_have_some(data, monkeypatch, backend):
    """A trial is a process of the cluster's, wherever that has room, with either backend."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = build_config(raw_config(data, backend=backend, device="cuda", precision="tf32"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no GPU is visible here"):
        sweep._check_data([config], open_dataset(config))
    monkeypatch.setenv("RAY_ADDRESS", "tiny-head-svc:6379")
    sweep._check_data([config], open_dataset(config))
    assert need_of([sweep._resolved(config, lambda: False)]).each["GPU"] == 1.0


def test_a_sweep_directory_is_a_path_or_a_file_url(data, tmp_path, monkeypatch):
    path, seen = write_sweep(tmp_path, data), []
    code, output = imaml_here("sweep", str(path), "--sweep-dir", "s3://bucket/s", cwd=tmp_path)
    assert (code, "scheme 's3' is not supported" in output, len(output.strip().splitlines())) == (2, True, 1), output
    monkeypatch.setattr(sweep, "_run", lambda search, *_: seen.append(search.directory.path) or True)
    code, output = imaml_here("sweep", str(path), "--sweep-dir", f"file://{tmp_path}/s", cwd=tmp_path)
    assert (code, seen) == (0, [tmp_path / "s"]), output
    assert {entry.name for entry in tmp_path.iterdir()} == {"sweep.yaml", "s"}


def test_a_folder_of_something_else_and_another_sweep_are_left_alone(data, tmp_path):
    path = write_sweep(tmp_path, data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    code, output = imaml_here("sweep", str(path), "--sweep-dir", "mine", cwd=tmp_path)
    assert (code, "it holds 'thesis.tex'" in output) == (2, True), output
    directory = SweepDirectory(tmp_path / "sweep")
    directory.begin(load_sweep(path))
    for override, says in (
        ("searcher.seed=5", "searcher.seed: 5 given, but the sweep in sweep was begun with 0"),
        ("base.outer.lr=0.5", "base.outer.lr: 0.5 given, but the sweep in sweep was begun with 0.003"),
        (
            "space={algorithm.solver.max_iterations: {kind: grid, values: [1, 3]}, algorithm.lam: "
            "{kind: loguniform, low: 0.05, high: 20.0}}",
            "order of space: 'algorithm.solver.max_iterations, algorithm.lam' given",
        ),
    ):
        code, output = imaml_here("sweep", str(path), "--sweep-dir", "sweep", "--set", override, cwd=tmp_path)
        assert (code, says in output) == (2, True), output


def test_a_leaderboard_in_a_file_or_a_pipe_has_a_line_for_each_trial(tmp_path, capsys):
    values = {f"algorithm.inner.{name}": 0.5 for name in ("a_long_name", "another_long_name", "one_more_of_these")}
    row = {"trial": 7, "status": "finished", "values": values, "accuracy": 0.8556, "ci95": 0.0227, "steps": 60}
    found = {"name": "wide", "space": values, "trials": [row], "best": 7, "test": None}
    show_outcome(found, SweepDirectory(tmp_path))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "finished" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "7",
        "0.5",
        "0.5",
        "0.5",
        "finished",
        "60",
        "85.56% ± 2.27",
    ]


CRASHES = """
import os, sys
from torch import nn
def make(image_shape, way):
    if sys.argv[0].endswith("trial.py"):
        os._exit(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, way))
"""


@pytest.mark.slow
def test_trials_that_fail_are_recorded_and_the_sweep_goes_on(data, tmp_path):
    """One that is given up at once, for it would only repeat itself, and two that crash, which are tried again."""
    (tmp_path / "mine.py").write_text(CRASHES)
    space = {
        "model": {"kind": "grid", "values": [{"kind": "conv4", "channels": 2}, {"kind": "mine:make"}]},
        "algorithm.inner.lr": {"kind": "grid", "values": [0.02, 1e12]},
    }
    path = write_sweep(tmp_path, data, space=space, searcher={"kind": "grid"}, budget={})
    code, output = imaml("sweep", str(path), "--sweep-dir", "sweep", cwd=tmp_path)
    assert code == 0, output
    assert "Traceback" not in output
    rows = leaderboard(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["finished", "failed", "failed", "failed"]
    assert [row["losses"] for row in rows] == [0, 0, 1, 1]
    assert "meta-steps in a row were skipped" in rows[1]["why"]
    assert "it crashed 2 times; see" in rows[2]["why"]
    assert "trial 2 crashed, and is started again" in output
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "Trial 1 failed: 10 meta-steps in a row were skipped" in page


@pytest.mark.slow
def test_ctrl_c_ends_with_checkpoints_and_the_same_command_goes_on(data, tmp_path):
    path = write_sweep(tmp_path, data, steps=60, budget={"trials": 2})
    words, folder = ("sweep", str(path), "--sweep-dir", "sweep"), tmp_path / "sweep"
    with Command(*words, cwd=tmp_path) as command:
        wait_for(lambda: begun(folder, 0) and begun(folder, 1), command)
        command.kill(signal.SIGINT)
        assert command.wait() == 130, command.output
    assert "the same command goes on with the sweep" in command.output
    assert not any(event["event"] == "ended" for event in ledger(folder))
    assert list((folder / "trials").glob("*/checkpoints/step-*"))
    code, output = imaml(*words, cwd=tmp_path)
    assert code == 0, output
    assert [row["status"] for row in json.loads((folder / "sweep.json").read_text())["trials"]] == ["finished"] * 2


@pytest.mark.slow
def test_mlflow_hears_of_a_signal_whenever_it_comes_and_of_the_end(data, tmp_path):
    """While trials are trained, while the best one is tested after that, and while it is tested by a command that trains nothing."""
    raw = base(data, 30) | {"tracking": {"mlflow": True}, "evaluate": {"tasks": 4000, "query": 5}}
    path = write_sweep(tmp_path, data, base=raw, budget={"trials": 1})
    words, folder = ("sweep", str(path), "--sweep-dir", "sweep"), tmp_path / "sweep"
    is_tested = (folder / "test.jsonl").is_file
    for number, time_has_come in (
        (signal.SIGTERM, lambda: begun(folder, 0)),
        (signal.SIGTERM, is_tested),
        (signal.SIGINT, is_tested),
    ):
        (folder / "test.jsonl").unlink(missing_ok=True)
        with Command(*words, cwd=tmp_path) as command:
            wait_for(time_has_come, command)
            command.kill(number)
            assert command.wait() == 130, command.output
        assert "the same command goes on with the sweep" in command.output and "Traceback" not in command.output
        assert not (folder / "sweep.json").exists()
        assert [run.info.status for run in mlflow_runs(tmp_path) if is_parent(run)] == ["KILLED"]
    code, output = imaml(*words, cwd=tmp_path)
    assert code == 0, output
    (parent,) = [run for run in mlflow_runs(tmp_path) if is_parent(run)]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["test/accuracy"] == json.loads((folder / "sweep.json").read_text())["test"]["accuracy"]
    assert [run.info.status for run in mlflow_runs(tmp_path)] == ["FINISHED"] * 2
    assert [e["event"] for e in ledger(folder)] == ["begun", "ended"]


def mlflow_runs(folder: Path) -> list:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([one.experiment_id for one in client.search_experiments()])


def is_parent(run) -> bool:
    return "mlflow.parentRunId" not in run.data.tags
