"""Real Ray workers: the bits of one local process, through the loss of a worker, of the driver, and Ctrl-C."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers.command import Command, imaml, wait_for_step
from helpers.ray_cluster import ray_cluster
from helpers.runs import fingerprint, tiny, train_alone, write_config

pytestmark = pytest.mark.faults

STEPS = 30
RUN = {"steps": STEPS, "checkpoint_every": 2, "backend": "ray", "workers": 2}


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    """One process, no Ray, nothing goes wrong."""
    return train_alone(tiny(data, steps=STEPS, checkpoint_every=2), tmp_path_factory.mktemp("gold") / "run")


@pytest.fixture
def config(data, tmp_path):
    return write_config(tmp_path / "tiny.yaml", data, **RUN)


def train(config, *more):
    return ("train", str(config), "--run-dir", str(config.parent / "run"), *more)


def listening(command):
    """(process, address) of every socket that the command's processes listen on."""
    found = []
    for pid in command.processes():
        try:
            connections = psutil.Process(pid).net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        found += [(pid, c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN]
    assert found, "Ray listens somewhere"
    return found


def result(config):
    run = config.parent / "run"
    summary = json.loads((run / "summary.json").read_text())
    found = fingerprint(run)
    assert summary["params_sha256"] == found["params"]
    assert summary["ledger"]["tasks"] == STEPS * 8
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS)), "every step once"
    return summary, found


@pytest.fixture
def another_cluster():
    """Where Ray notes which cluster was started last on a machine; nobody answers at this one's address."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short name: sockets lie below it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        yield {"RAY_TMPDIR": folder}


def test_two_workers_give_the_bits_of_the_local_backend(config, gold, tmp_path, another_cluster):
    with Command(*train(config), cwd=tmp_path, **another_cluster) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 1, command)
        exposed = [pid for pid, ip in listening(command) if not ip.removeprefix("::ffff:").startswith("127.")]
        assert exposed == []
        assert command.wait() == 0, command.output
    summary, found = result(config)
    assert found == gold
    assert (summary["world_size"], summary["restarts"]) == (2, 0)
    assert not (tmp_path / "run" / "ray").exists()
    code, output = imaml(*train(config), cwd=tmp_path)
    assert code == 0
    assert "is finished" in output


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_worker_changes_nothing(config, gold, tmp_path, rank):
    with Command(*train(config), cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 3, command)
        start = json.loads((tmp_path / "run" / "starts.jsonl").read_text().splitlines()[0])
        os.kill(start["pids"][rank], signal.SIGKILL)
        assert command.wait() == 0, command.output
    assert (
        f"rank {rank} (process {start['pids'][rank]}) ended with signal SIGKILL; going on from step" in command.output
    )
    summary, found = result(config)
    assert found == gold
    assert summary["restarts"] == 1


@pytest.mark.slow  # a command is killed by `test_remote_runs.test_the_commands`, a driver of Ray's by `test_sweep`
def test_a_killed_driver_leaves_no_process_and_the_same_command_goes_on(config, gold, tmp_path):
    with Command(*train(config), cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 3, command)
        command.kill()
    code, output = imaml(*train(config), cwd=tmp_path)
    assert code == 0, output
    summary, found = result(config)
    assert found == gold
    assert summary["restarts"] >= 1


@pytest.mark.slow  # `test_remote_runs.test_the_commands` presses it, too
def test_ctrl_c_writes_a_checkpoint_and_the_local_backend_takes_over(config, gold, tmp_path):
    with Command(*train(config), cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, command)
        command.kill(signal.SIGINT)
        began = time.monotonic()
        assert command.wait() == 130, command.output
        assert time.monotonic() - began < 60
    assert "interrupted" in command.output
    code, output = imaml(*train(config, "--backend", "local"), cwd=tmp_path)
    assert code == 0, output
    assert result(config)[1] == gold


def test_training_that_cannot_go_on_says_why_and_exits_with_4(config, tmp_path):
    code, output = imaml(*train(config, "--set", "algorithm.inner.lr=1e12"), cwd=tmp_path)
    assert code == 4, output
    assert "10 meta-steps in a row were skipped" in output
    assert "Traceback" not in output


@pytest.mark.slow  # the test above hears of an error through Ray, too
def test_what_rank_0_found_out_reaches_the_user_whichever_rank_reports_last(config, data, tmp_path):
    """Every checkpoint damaged: rank 0 says so, the others only know that it gave up."""
    train_alone(tiny(data, steps=4, checkpoint_every=2), tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/state.safetensors"):
        file.write_bytes(b"damaged")
    code, output = imaml(*train(config), cwd=tmp_path)
    assert code == 2, output
    assert "no checkpoint in" in output
    assert "start over with --fresh" in output


@pytest.mark.slow
def test_a_lost_node_is_gone_on_without(data, gold, tmp_path):
    """Two nodes with a worker each; the run may go on with one."""
    config = write_config(tmp_path / "tiny.yaml", data, **RUN | {"workers": {"min": 1, "max": 2}})
    with ray_cluster(nodes=2) as cluster, Command(*train(config), cwd=tmp_path, **cluster.env) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 3, command)
        cluster.order("lose")
        assert command.wait() == 0, command.output
    summary, found = result(config)
    assert found == gold
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == [2, 1]
    assert summary["world_size"] == 1


def test_a_cluster_without_room_is_named_before_anything_starts(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, **RUN | {"workers": 3})
    with ray_cluster(nodes=2) as cluster:
        code, output = imaml(*train(config), cwd=tmp_path, **cluster.env)
    assert code == 3
    assert (
        "the run needs 3 workers of 1 CPU each, but the cluster's 3 nodes (2 CPU in all) have room for 2: CPU fall short"
        in output
    )
    assert not (tmp_path / "run" / "starts.jsonl").exists()
