"""Ray nodes that come late: a run that cannot do without a lost node waits for another, and gives the bits of one process."""

import json
import signal
import time

import pytest
from helpers.command import Command, wait_for_step
from helpers.ray_cluster import ray_cluster
from helpers.runs import fingerprint, tiny, train_alone, write_config

from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.worker import Worker
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STEPS = 60
START_S = 2
"""For Ray to find room for the workers, before it counts that as a failure and tries again."""


def test_a_node_may_come_long_after_another_was_lost(data, tmp_path):
    gold = train_alone(tiny(data, steps=STEPS), tmp_path / "gold")
    config = write_config(tmp_path / "tiny.yaml", data, steps=STEPS, backend="ray", workers=2)
    run = tmp_path / "run"
    with ray_cluster(nodes=2) as cluster:
        env = cluster.env | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S)}
        with Command("train", str(config), "--run-dir", str(run), cwd=tmp_path, **env) as command:
            wait_for_step(run / "metrics.jsonl", 3, command)
            cluster.order("lose")
            time.sleep(12 * START_S)
            cluster.order("add")
            assert command.wait() == 0, command.output
    assert fingerprint(run) == gold
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == [2, 2]


def test_an_elastic_run_grows_onto_a_node_that_comes(data, tmp_path):
    """Ray looks once a minute; all workers then go on from the newest checkpoint."""
    bounds = {"min": 1, "max": 2}
    raw = {
        "steps": 10**6,
        "tasks_per_step": 64,
        "chunk": 32,
        "checkpoint_every": 20,
        "backend": "ray",
        "workers": bounds,
    }
    config = write_config(tmp_path / "tiny.yaml", data, **raw)
    run = RunDirectory(tmp_path / "run")
    with ray_cluster(nodes=1) as cluster:
        env = cluster.env | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S)}
        command = ("train", str(config), "--set", "validate.tasks=0", "--run-dir", str(run.path))
        with Command(*command, cwd=tmp_path, **env) as command:
            wait_for_step(run.metrics_file, 3, command)
            cluster.order("add")
            deadline = time.monotonic() + 240
            while len(run.starts()) < 2:
                assert command.process.poll() is None, command.wait()
                assert time.monotonic() < deadline, "it has not grown"
                time.sleep(0.5)
            grown = run.starts()[-1]
            wait_for_step(run.metrics_file, grown["step"] + 30, command)
            command.kill(signal.SIGINT)
            assert command.wait() == 130, command.output
    assert [start["world_size"] for start in run.starts()] == [1, 2]
    assert grown["step"] > 0
    tensors, facts = run.newest_checkpoint()
    steps = facts["ledger"]["steps"]
    alone = tiny(
        data, "validate.tasks=0", "evaluate.tasks=0", **raw | {"steps": steps, "workers": 1, "backend": "local"}
    )
    undisturbed = RunDirectory(tmp_path / "gold")
    undisturbed.begin(alone)
    Worker(alone, undisturbed, Alone()).run_to_end()
    gold, gold_facts = undisturbed.newest_checkpoint()
    assert sha256_of(tensors) == sha256_of(gold)
    assert facts["ledger"] == gold_facts["ledger"]
    assert [record["step"] for record in metrics_file.read(run.metrics_file)] == list(range(steps))


def test_an_elastic_run_that_waits_for_room_can_be_interrupted(data, tmp_path):
    """Fewer than its fewest workers have room, so no worker is there that could hear of it."""
    config = write_config(tmp_path / "tiny.yaml", data, steps=10**6, backend="ray", workers={"min": 2, "max": 3})
    run = RunDirectory(tmp_path / "run")
    with ray_cluster(nodes=2) as cluster:
        env = cluster.env | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_S)}
        with Command("train", str(config), "--run-dir", str(run.path), cwd=tmp_path, **env) as command:
            wait_for_step(run.metrics_file, 3, command)
            cluster.order("lose")
            time.sleep(12 * START_S)
            assert command.process.poll() is None
            command.kill(signal.SIGINT)
            assert command.wait() == 130, command.output
    assert len(run.starts()) == 1
