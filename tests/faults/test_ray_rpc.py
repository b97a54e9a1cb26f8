"""Ray's own messages get lost: the bits stay those of one process."""

import json

import pytest
from helpers.command import imaml
from helpers.runs import fingerprint, tiny, train_alone, write_config

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STEPS = 30
LOST = {"num_failures": -1, "req_failure_prob": 25, "resp_failure_prob": 25, "in_flight_failure_prob": 0}
"""Of every hundred messages: requests that do not arrive, and answers that do not come back; for ever."""
METHODS = ("CoreWorkerService.grpc_client.PushTask", "NodeManagerService.grpc_client.RequestWorkerLease")


def test_lost_messages_of_ray_change_nothing(data, tmp_path):
    gold = train_alone(tiny(data, steps=STEPS), tmp_path / "gold")
    config = write_config(tmp_path / "tiny.yaml", data, steps=STEPS, backend="ray", workers=2)
    faults = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(METHODS, LOST))}
    code, output = imaml("train", str(config), "--run-dir", str(tmp_path / "run"), cwd=tmp_path, **faults)
    assert code == 0, output
    assert fingerprint(tmp_path / "run") == gold
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
