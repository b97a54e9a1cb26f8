"""Ray nodes that come late: a run that cannot do without a lost node waits for another, and gives the bits of one process."""

import json
import time

import pytest
from helpers.command import Command, wait_for_step
from helpers.ray_cluster import ray_cluster
from helpers.runs import fingerprint, tiny, train_alone, write_config

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
