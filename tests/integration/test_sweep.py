"""`imaml sweep` with real Ray: the trials' own training runs, kills of driver and trials, early stopping that leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.command import ROOT, Command, imaml
from helpers.ray_cluster import clean_environment, ray_cluster
from helpers.runs import raw_config

from imaml_dist.config.load import build_config
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.data.frozen import freeze, publish
from imaml_dist.distributed.build import make_source, open_dataset, resolve
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.worker import Worker
from imaml_dist.sweeps.drawing import draw
from imaml_dist.sweeps.search import measured
from imaml_dist.training.run_directory import RunDirectory

TRIALS, STEPS = 4, 12
TIMES = ("seconds", "began", "ended", "losses")


def base(data: Path, steps: int) -> dict:
    """A network too small and adapted too little to be right about every image."""
    raw = raw_config(data, steps=steps)
    hard = {"inner": {"steps": 1, "lr": 0.02}, "solver": {"max_iterations": 2}}
    return raw | {
        "model": {"kind": "conv4", "channels": 2},
        "algorithm": {"kind": "imaml", **hard},
        "validate": {"every": 3, "tasks": 12},
    }


def write_sweep(folder: Path, data: Path, steps: int = STEPS, **fields) -> Path:
    raw = {
        "name": "sweep",
        "base": base(data, steps),
        "space": {
            "algorithm.lam": {"kind": "loguniform", "low": 0.05, "high": 20.0},
            "algorithm.solver.max_iterations": {"kind": "grid", "values": [1, 3]},
        },
        "budget": {"trials": TRIALS},
        "validation": {"tasks": 24},
        **fields,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def table(folder: Path) -> list[dict]:
    """The leaderboard without what a clock says."""
    rows = json.loads((folder / "sweep.json").read_text())["trials"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


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


def ledger(folder: Path) -> list[dict]:
    path = folder / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition, command: Command, timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert command.process.poll() is None, f"ended too early:\n{command.wait()}\n{command.output}"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def begun(folder: Path, trial: int) -> bool:
    """Whether a trial has taken a meta-step."""
    metrics = folder / "trials" / f"{trial:04d}" / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def trainer(folder: Path, trial: int) -> int:
    """Process id of a trial of the local backend."""
    starts = (folder / "trials" / f"{trial:04d}" / "starts.jsonl").read_text().splitlines()
    return json.loads(starts[-1])["pids"][0]


def test_driver_and_trials_are_killed_and_the_table_is_that_of_trials_trained_alone(data, tmp_path):
    """On a cluster that stays, for it to have to free what a killed driver held."""
    path = write_sweep(tmp_path, data, steps=60)
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


LEFT = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
from ray._private.state import actors
from ray.util import placement_group_table
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
alive = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
print(json.dumps({"actors": alive, "groups": groups, "free": ray.available_resources().get("CPU", 0.0)}))
"""


def left(env: dict[str, str]) -> dict:
    """What lives on a cluster: actors, placement groups, and the CPUs that nothing has reserved."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT],
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_trials_that_asha_stops_leave_no_actor_no_group_and_no_reserved_cpu(data, tmp_path):
    """Trials with workers on Ray: one CPU each, two at a time, on a cluster that stays."""
    path = write_sweep(
        tmp_path,
        data,
        steps=400,
        set={"run.backend": "ray", "run.workers": 1, "validate.every": 10},
        space={"outer.lr": {"kind": "grid", "values": [0.003, 8.0, 7.0, 9.0, 6.0]}},
        searcher={"kind": "grid"},
        scheduler={"kind": "asha", "grace": 10, "reduction": 2.0},
        budget={},
    )
    with ray_cluster(nodes=2) as cluster:
        code, output = imaml("sweep", str(path), "--sweep-dir", "sweep", cwd=tmp_path, timeout=280, **cluster.env)
        assert code == 0, output
        assert "2 at a time" in output
        deadline = time.monotonic() + 30
        while (found := left(cluster.env)) != {"actors": [], "groups": [], "free": 2.0} and time.monotonic() < deadline:
            time.sleep(1)
        assert found == {"actors": [], "groups": [], "free": 2.0}
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert stopped and all(row["steps"] < 400 for row in stopped)
    assert rows[0]["status"] == "finished"
    assert [p for p in psutil.process_iter() if "pipelines.trial" in " ".join(p.info.get("cmdline") or [])] == []
