"""Real Ray nodes on pretend machines: one is killed, cut off for good, or cut off for a while; the bits stay those of one process."""

import json
import time

import pytest
from helpers.command import Command, wait_for_step
from helpers.netns import why_not
from helpers.ray_machines import HEAD, ray_machines
from helpers.runs import fingerprint, tiny, train_alone, write_config

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

STEPS = 60
RUN = {
    "steps": STEPS,
    "checkpoint_every": 2,
    "backend": "ray",
    "workers": {"min": 1, "max": 2},
    "heartbeat_timeout": 5.0,
}
CUT_S = 5.0


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    """One process, no Ray, nothing goes wrong."""
    return train_alone(tiny(data, steps=STEPS, checkpoint_every=2), tmp_path_factory.mktemp("gold") / "run")


@pytest.fixture
def ray(tmp_path):
    """Three machines: the head, 0, and two with room for one worker each."""
    with ray_machines(2, tmp_path / "machines") as cluster:
        yield cluster


@pytest.fixture
def patience():
    """Seconds that a worker waits for the others."""
    return 2 * CUT_S


@pytest.fixture
def training(ray, data, patience, tmp_path):
    """`imaml train` on the head, some steps into the run."""
    config = write_config(tmp_path / "tiny.yaml", data, **RUN, collective_timeout=patience)
    arguments = ("train", str(config), "--run-dir", str(tmp_path / "run"))
    inside = ray.machines.inside(HEAD)
    env = ray.env | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    with Command(*arguments, cwd=tmp_path, inside=inside, **env) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 3, command)
        yield command


def check(training, run, gold):
    """The same result and every step once, whatever happened; how the run was begun each time."""
    assert training.wait(480) == 0, training.output
    assert fingerprint(run) == gold
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def machine(request, ray, training, tmp_path):
    """The one that has this rank."""
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text().splitlines()[0])
    return next(i for i in (1, 2) if start["pids"][request.param] in ray.machines.processes(i))


def test_a_killed_machine_is_gone_on_without(ray, training, gold, tmp_path, machine):
    ray.machines.kill(machine)
    starts = check(training, tmp_path / "run", gold)
    assert [start["world_size"] for start in starts] == [2, 1]


@pytest.mark.parametrize("patience", [120.0], ids=["default"])
def test_a_machine_that_falls_silent_for_good_is_gone_on_without(ray, training, gold, tmp_path, machine):
    """If it was rank 0's, another must wait until that has lost patience, and writes no more into the run directory."""
    ray.machines.cut(machine)
    starts = check(training, tmp_path / "run", gold)
    assert [start["world_size"] for start in starts] == [2, 1]


@pytest.mark.parametrize("patience", [CUT_S / 2, 2 * CUT_S], ids=["impatient", "patient"])
def test_a_machine_that_falls_silent_for_a_while_changes_nothing(ray, training, gold, tmp_path, machine, patience):
    """With patience the run only stands still; without it the group is lost while its keepers cannot talk."""
    ray.machines.cut(machine)
    time.sleep(CUT_S)
    ray.machines.mend(machine)
    starts = check(training, tmp_path / "run", gold)
    assert len(starts) > 1 or patience > CUT_S
