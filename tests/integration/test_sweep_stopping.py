"""`imaml sweep` with trials that are stopped early: nothing of them stays behind, and what has ended outlives a kill of the driver."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.command import ROOT, Command, imaml
from helpers.ray_cluster import clean_environment, ray_cluster
from helpers.sweeps import leaderboard, ledger, wait_for, write_sweep

LEARNS, FAILS = 0.003, (8.0, 7.0, 9.0, 6.0)
"""Rates of the outer optimiser."""


LEFT = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
from ray._private.state import actors
from ray.util import placement_group_table
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
alive = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
alive.remove("_AutoscalingCoordinatorActor") if "_AutoscalingCoordinatorActor" in alive else None
print(json.dumps({"actors": alive, "groups": groups, "free": ray.available_resources().get("CPU", 0.0)}))
"""


def left(env: dict[str, str]) -> dict:
    """What lives on a cluster: actors, placement groups, and the CPUs that nothing has reserved.

    Without one actor of Ray's own, which has no CPU and belongs to no trial: the first training run on a cluster starts it, for good.
    """
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
        space={"outer.lr": {"kind": "grid", "values": [LEARNS, *FAILS]}},
        searcher={"kind": "grid"},
        scheduler={"kind": "asha", "grace": 10, "reduction": 2.0},
        budget={},
    )
    with ray_cluster(nodes=2) as cluster:
        code, output = imaml("sweep", str(path), "--sweep-dir", "sweep", cwd=tmp_path, timeout=280, **cluster.env)
        assert code == 0, output
        assert "2 at a time" in output
        wide = ("--set", "base.run.threads=2", "--sweep-dir", "wide")
        code, output = imaml("sweep", str(path), *wide, cwd=tmp_path, **cluster.env)
        says = (
            "a trial needs 1 workers with 2 CPUs each, the Ray cluster has room for 0; lower run.workers, run.threads"
        )
        assert (code, says in output) == (3, True), output
        deadline = time.monotonic() + 30
        while (found := left(cluster.env)) != {"actors": [], "groups": [], "free": 2.0} and time.monotonic() < deadline:
            time.sleep(1)
        assert found == {"actors": [], "groups": [], "free": 2.0}
    rows = leaderboard(tmp_path / "sweep")
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert stopped and all(row["steps"] < 400 for row in stopped)
    assert rows[0]["status"] == "finished"
    trained = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert [words for words in trained if "pipelines.trial" in words and str(tmp_path) in words] == []


@pytest.mark.slow
def test_optuna_and_the_median_rule_keep_what_has_ended_through_a_kill_of_the_driver(data, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    check_kept_through_a_kill(
        tmp_path,
        data,
        trials=7,
        space={
            "algorithm.lam": {"kind": "loguniform", "low": 0.05, "high": 20.0},
            "outer.lr": {"kind": "choice", "values": [LEARNS, 9.0]},
        },
        searcher={"kind": "optuna", "startup": 3},
        scheduler={"kind": "median", "grace": 9, "min_trials": 2},
        budget={"trials": 7},
    )


@pytest.mark.slow
def test_asha_keeps_what_has_ended_through_a_kill_of_the_driver_and_goes_on_to_stop(data, tmp_path):
    rates = [LEARNS, *FAILS, 0.002]
    kept = check_kept_through_a_kill(
        tmp_path,
        data,
        trials=len(rates),
        space={"outer.lr": {"kind": "grid", "values": rates}},
        searcher={"kind": "grid"},
        scheduler={"kind": "asha", "grace": 9, "reduction": 2.0},
        budget={},
    )
    assert "stopped" in {row["status"] for row in leaderboard(tmp_path / "sweep") if row["trial"] not in kept}


def check_kept_through_a_kill(where: Path, data: Path, trials: int, **fields) -> set[int]:
    """The driver is killed when a trial is finished and another one is trained; the same command ends the sweep and lets trials alone
    that had ended: each one's ledger, starts and metrics are what they were.

    Returns:
        Those that had ended.
    """
    path = write_sweep(where, data, steps=60, **fields)
    words, folder = ("sweep", str(path), "--sweep-dir", "sweep"), where / "sweep"
    with ray_cluster(nodes=2) as cluster:
        with Command(*words, cwd=where, **cluster.env) as command:
            wait_for(lambda: any(event.get("status") == "finished" for event in ledger(folder)), command)
            wait_for(lambda: open_trials(folder), command)
            command.kill()
        before = ledger(folder)
        ended = [event for event in before if event["event"] == "ended"]
        kept = [trained(folder, event) for event in ended]
        assert 1 <= len(kept) < trials
        code, output = imaml(*words, cwd=where, **cluster.env)
        assert code == 0, output
    events = ledger(folder)
    assert events[: len(before)] == before
    for number in range(trials):
        assert [e["event"] for e in events if e["trial"] == number and e["event"] != "lost"] == ["begun", "ended"]
    assert [trained(folder, event) for event in ended] == kept
    assert len(leaderboard(folder)) == trials
    assert {row["status"] for row in leaderboard(folder)} <= {"finished", "stopped"}
    return {event["trial"] for event in ended}


def open_trials(folder: Path) -> set[int]:
    """Trials that have begun and not ended."""
    events = ledger(folder)
    return {e["trial"] for e in events} - {e["trial"] for e in events if e["event"] == "ended"}


def trained(folder: Path, ended: dict) -> list[str]:
    """What a trial's run directory says of its training: all starts; and all meta-steps with their times, if it was trained to its end,
    for one that was stopped may still be leaving."""
    run = folder / "trials" / f"{ended['trial']:04d}"
    files = ["starts.jsonl", "metrics.jsonl"] if ended["status"] == "finished" else ["starts.jsonl"]
    return [(run / name).read_text() for name in files]
