"""Ray's own messages get lost: the bits stay those of one process."""

import json

import pytest
from helpers.command import imaml
from helpers.ray_cluster import ray_cluster
from helpers.runs import fingerprint, tiny, train_alone, write_config

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 30
TO_ACTORS, FOR_ROOM = "CoreWorkerService.grpc_client.PushTask", "NodeManagerService.grpc_client.RequestWorkerLease"


def losses(most, requests, answers, *messages):
    """Of every hundred such messages of a process so many are lost, until `most` are."""
    chance = {"req_failure_prob": requests, "resp_failure_prob": answers, "in_flight_failure_prob": 0}
    return {"RAY_testing_rpc_failure": json.dumps({each: {"num_failures": most, **chance} for each in messages})}


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    """One process, no Ray, nothing goes wrong."""
    return train_alone(tiny(data, steps=STEPS), tmp_path_factory.mktemp("gold") / "run")


@pytest.fixture
def train(data, tmp_path):
    """Runs `imaml train` on a cluster to its end."""
    config = write_config(tmp_path / "tiny.yaml", data, steps=STEPS, backend="ray", workers=2)
    return lambda **env: imaml(
        "train", str(config), "--run-dir", str(tmp_path / "run"), cwd=tmp_path, timeout=480, **env
    )


def check(run, gold):
    """The same result, and every step once."""
    assert fingerprint(run) == gold
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))


def test_messages_lost_within_the_cluster_change_nothing(train, gold, tmp_path):
    """Ray repeats requests for room, but none to actors: each of these that is lost costs Ray Train the group."""
    with ray_cluster(2, **losses(3, 25, 25, TO_ACTORS, FOR_ROOM)) as cluster:
        code, output = train(**cluster.env)
    assert code == 0, output
    check(tmp_path / "run", gold)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_command_that_loses_its_run_says_how_to_go_on(train, gold, tmp_path, lost):
    requests, answers = (100, 0) if lost == "request" else (0, 100)
    with ray_cluster(2) as cluster:
        code, output = train(**cluster.env, **losses(1, requests, answers, TO_ACTORS))
        assert code == 4, output
        assert "run the same command again to resume" in output
        assert "Traceback" not in output
        code, output = train(**cluster.env)
    assert code == 0, output
    check(tmp_path / "run", gold)
