"""Real rank processes under keepers, without Ray: killed in every phase, stopped, damaged; the bits stay those of one process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.crew import Keepers
from helpers.runs import fingerprint, tiny, train_alone

from imaml_dist.distributed.stop import Stop
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory

pytestmark = pytest.mark.faults

SABOTAGE = Path(__file__).parents[1] / "helpers" / "sabotage"
HANG, FLIP, SLOW = 0, -1, -2
PHASES = ("data", "inner", "solve", "reduce", "update", "checkpoint", "report")
STEPS = 24


def configured(data, *overrides, **run):
    return tiny(data, *overrides, **{"steps": STEPS, "checkpoint_every": 2, "workers": 2, **run})


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    """One process, and nothing goes wrong."""
    return train_alone(configured(data), tmp_path_factory.mktemp("gold") / "run")


@pytest.fixture
def sabotage(monkeypatch, tmp_path):
    """Sets what rank processes do to themselves: `(rank, step, place, signal)`."""

    def plan(*entries):
        (tmp_path / "plan.json").write_text(json.dumps(entries))
        monkeypatch.setenv("SABOTAGE", str(tmp_path / "plan.json"))
        monkeypatch.syspath_prepend(str(SABOTAGE))

    yield plan
    sys.modules.pop("sitecustomize", None)


def begun(config, path):
    RunDirectory(path).begin(config)
    return path


def check(path, gold):
    """The same result, and every step in the metrics once."""
    assert fingerprint(path) == gold
    lines = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(STEPS))


def happened(tmp_path):
    return len(list(tmp_path.glob("plan.json.*")))


@pytest.mark.parametrize(
    "ranks", [lambda n: (n % 2,), pytest.param(lambda n: (0, 1), marks=pytest.mark.slow)], ids=["in turn", "both"]
)
def test_ranks_killed_in_every_phase_change_nothing_and_no_step_is_done_twice(data, gold, tmp_path, sabotage, ranks):
    faults = [(rank, 1 + 2 * n + rank, phase, signal.SIGKILL) for n, phase in enumerate(PHASES) for rank in ranks(n)]
    sabotage(*faults)
    with Keepers(configured(data), begun(configured(data), tmp_path / "run"), 2) as keepers:
        pass
    assert keepers.results == [Stop.STEPS, Stop.STEPS], keepers.failures
    assert happened(tmp_path) == len(faults)
    check(tmp_path / "run", gold)
    starts = keepers.run.starts()
    assert len(starts) == 1 + len(faults)
    assert [start.get("from") for start in starts] == [None] + ["memory"] * len(faults)
    assert all("SIGKILL" in start["after"] for start in starts[1:])
    reached = [start["step"] for start in starts]
    assert reached == sorted(reached)


def killed_at_random(keepers, kills, seed):
    """Processes of the newest group, each some time after the group began; four in a row without a step would end the run."""
    choose = random.Random(seed)
    for n in range(kills):
        keepers.wait(lambda n=n: len(keepers.run.starts()) > n)
        if n % 3 == 2:
            keepers.wait_for_step(keepers.run.starts()[n]["step"])
        time.sleep(choose.uniform(0.0, 1.0))
        os.kill(choose.choice(keepers.pids()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_twenty_kills_at_random_times_change_nothing(data, tmp_path, world):
    config = configured(data, steps=150, workers=world)
    gold = train_alone(config, tmp_path / "gold")
    with Keepers(config, begun(config, tmp_path / "run"), world) as keepers:
        killed_at_random(keepers, 20, seed=world)
    assert keepers.results == [Stop.STEPS] * world, keepers.failures
    assert len(keepers.run.starts()) > 20
    assert fingerprint(tmp_path / "run") == gold


@pytest.mark.slow
def test_four_workers_then_two_then_three_give_the_bits_of_one(data, tmp_path):
    config = configured(data, steps=60)
    gold, run = train_alone(config, tmp_path / "gold"), RunDirectory(tmp_path / "run")
    for world, last in ((4, 10), (2, 25), (3, None)):
        run.begin(config)
        with Keepers(config, run.path, world) as keepers:
            if last is not None:
                keepers.wait_for_step(last)
                run.request_stop()
        assert keepers.results == [Stop.STEPS if last is None else Stop.INTERRUPTED] * world
    assert [start["world_size"] for start in run.starts()] == [4, 2, 3]
    assert fingerprint(run.path) == gold


def test_a_stopped_process_is_found_and_replaced(data, gold, tmp_path):
    config = configured(data)
    with Keepers(config, begun(config, tmp_path / "run"), 2, silence=2.0) as keepers:
        keepers.wait_for_step(2)
        os.kill(keepers.pids()[0], signal.SIGSTOP)
    check(tmp_path / "run", gold)
    found = [
        start for start in keepers.run.starts()[1:] if "rank 0" in start["after"] and "silent for" in start["after"]
    ]
    assert found
    assert all(start["from"] == "memory" for start in found)


def test_a_rank_that_hangs_while_it_gives_signs_of_life_is_replaced(data, gold, tmp_path, sabotage):
    """Its keeper hears it; the others wait for it in vain."""
    sabotage((1, 3, "inner", HANG))
    config = configured(data)
    with Keepers(config, begun(config, tmp_path / "run"), 2, collective=3.0) as keepers:
        pass
    check(tmp_path / "run", gold)
    told = [start["after"] for start in keepers.run.starts()[1:]]
    # On a busy machine its keeper may be tired of it before the other rank is.
    assert any("rank 1" in after and ("did not leave" in after or "computed one chunk" in after) for after in told), (
        told
    )


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_that_all_hang_at_once_are_replaced(data, gold, tmp_path, sabotage, world):
    """Nobody waits for them but their keepers."""
    sabotage(*((rank, 3, "inner", HANG) for rank in range(world)))
    config = configured(data, workers=world)
    with Keepers(config, begun(config, tmp_path / "run"), world, collective=3.0) as keepers:
        pass
    check(tmp_path / "run", gold)
    told = [start["after"] for start in keepers.run.starts()[1:]]
    assert any("computed one chunk of tasks for" in after and "timeout is 3" in after for after in told), told


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_joins_the_next_group_costs_the_survivor_nothing(data, gold, tmp_path, sabotage):
    """There is no collective yet in which the survivor could wait for it in vain."""
    sabotage((1, 3, "inner", signal.SIGKILL), (1, 1, "join", HANG))
    config = configured(data)
    with Keepers(config, begun(config, tmp_path / "run"), 2, collective=3.0) as keepers:
        pass
    assert happened(tmp_path) == 2
    check(tmp_path / "run", gold)
    first, second = keepers.run.starts()
    assert second["from"] == "memory"
    assert second["pids"][0] == first["pids"][0]


@pytest.mark.slow
def test_a_rank_that_is_alone_and_hangs_while_it_joins_is_replaced(data, gold, tmp_path, sabotage):
    sabotage((0, 0, "join", HANG))
    config = configured(data, workers=1)
    with Keepers(config, begun(config, tmp_path / "run"), 1, collective=3.0) as keepers:
        pass
    check(tmp_path / "run", gold)
    (start,) = keepers.run.starts()
    assert "did not join its group for" in start["after"]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place", ["data", pytest.param("report", marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_its_rank_named_and_replaced_and_the_steps_done_again(
    data, gold, tmp_path, sabotage, world, place
):
    """Two ranks cannot tell by a vote; it shows when the steps have been taken again. One flip is before, one after an update."""
    sabotage((1, 9, place, FLIP))
    config = configured(data, workers=world, compare_every=6, checkpoint_every=12)
    with Keepers(config, begun(config, tmp_path / "run"), world) as keepers:
        pass
    assert keepers.results == [Stop.STEPS] * world, keepers.failures
    check(tmp_path / "run", gold)
    starts = keepers.run.starts()
    reasons = [start["after"] for start in starts[1:]]
    found = {"data": 10, "report": 11}[place]
    assert f"differ at step {found}; all go back to step 6" in reasons[0]
    assert starts[1]["step"] == 6
    assert "rank 1" in reasons[-1]
    before, after = starts[0]["pids"], starts[-1]["pids"]
    assert [a != b for a, b in zip(before, after, strict=True)] == [rank == 1 for rank in range(world)]


def test_a_slow_rank_is_named_and_given_less_to_do_and_the_bits_stay(data, gold, tmp_path, sabotage):
    sabotage((1, 0, "inner", SLOW))
    config = configured(data, compare_every=4, checkpoint_every=12)
    with Keepers(config, begun(config, tmp_path / "run"), 2):
        pass
    check(tmp_path / "run", gold)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["slowest_rank"] for r in records[1:4]] == [1, 1, 1]
    assert records[3]["seconds_slowest_rank"] > records[3]["seconds_fastest_rank"] + 0.05
    assert (records[0]["chunks_fewest"], records[0]["chunks_most"]) == (2, 2)
    assert records[4]["chunks_most"] > 2


def spares(keepers):
    """Processes of ranks that wait, ready: they listen and beat."""
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    found = [child for child in living if "imaml_dist.distributed.rank" in child.cmdline()]
    return [child.pid for child in found if child.pid not in keepers.pids() and child.num_threads() >= 3]


@pytest.mark.slow
def test_spares_that_died_are_not_used(data, gold, tmp_path, sabotage):
    sabotage((0, 0, "data", SLOW))  # until the spares are there
    config = configured(data, deal="even")
    with Keepers(config, begun(config, tmp_path / "run"), 2) as keepers:
        keepers.wait(lambda: keepers.run.starts() and len(spares(keepers)) == 2)
        for pid in [*spares(keepers), keepers.pids()[1]]:
            os.kill(pid, signal.SIGKILL)
    assert keepers.results == [Stop.STEPS, Stop.STEPS], keepers.failures
    check(tmp_path / "run", gold)
    assert [start.get("from") for start in keepers.run.starts()] == [None, "memory"]


@pytest.mark.slow
def test_a_rank_lost_while_the_next_group_is_made_costs_the_survivor_nothing(data, gold, tmp_path, sabotage):
    """The spare that takes the lost one's place is stopped before it can: the others wait for it outside of any group."""
    sabotage((0, 0, "data", SLOW))
    config = configured(data, deal="even")
    with Keepers(config, begun(config, tmp_path / "run"), 2, silence=2.0) as keepers:
        keepers.wait(lambda: keepers.run.starts() and len(spares(keepers)) == 2)
        for pid in spares(keepers):
            os.kill(pid, signal.SIGSTOP)
        first = keepers.pids()
        os.kill(first[1], signal.SIGKILL)
    check(tmp_path / "run", gold)
    last = keepers.run.starts()[-1]
    assert last["from"] == "memory"
    assert last["pids"][0] == first[0]


def test_a_failure_of_rank_0_stands_although_the_other_rank_says_first_that_it_lost_it(data, tmp_path):
    path, config = begun(configured(data), tmp_path / "run"), configured(data)
    (path / "checkpoints" / "step-00000002").mkdir(parents=True)
    keepers = Keepers(config, path, 2, slow_to_tell=0.5)
    with keepers:
        pass
    assert keepers.results == [None, None]
    assert [kind for kind, _ in keepers.failures] == ["CheckpointError"]
    assert keepers.run.starts() == []


def test_sigterm_has_a_checkpoint_written_at_once(data, tmp_path):
    config = configured(data, steps=100_000, checkpoint_every=100_000)
    with Keepers(config, begun(config, tmp_path / "run"), 2) as keepers:
        run = keepers.run
        keepers.wait_for_step(2)  # the first validation, and so the first checkpoint, is behind
        keepers.wait(lambda: checkpoints.steps(run.checkpoints) == [3])
        os.kill(keepers.pids()[1], signal.SIGTERM)
        keepers.wait(lambda: checkpoints.steps(run.checkpoints)[-1] > 3)
        (_, saved) = checkpoints.steps(run.checkpoints)
        keepers.wait_for_step(saved + 5)
        assert checkpoints.steps(run.checkpoints) == [3, saved], "once"
        run.request_stop()
    assert keepers.results == [Stop.INTERRUPTED, Stop.INTERRUPTED]
    assert len(run.starts()) == 1, "and it trains on"
    assert checkpoints.load_newest(run.checkpoints) is not None


def test_a_process_killed_at_every_write_of_a_checkpoint_loses_no_earlier_one(data, gold, tmp_path, sabotage):
    """Alone, so that nobody remembers: the next process begins with the newest checkpoint that verifies."""
    faults = [(0, 1 + 2 * n, f"commit-{n}", signal.SIGKILL) for n in range(8)]
    sabotage(*faults)
    config = configured(data, workers=1)
    with Keepers(config, begun(config, tmp_path / "run"), 1) as keepers:
        pass
    assert happened(tmp_path) == len(faults)
    check(tmp_path / "run", gold)
    starts = keepers.run.starts()
    assert [start.get("from") for start in starts] == [None] * len(starts)
    assert len(starts) == 1 + len(faults)
    reached = [start["step"] for start in starts]
    assert reached == sorted(reached)


def test_what_a_user_got_wrong_ends_the_run_on_all_ranks_at_once(data, tmp_path):
    config = configured(data, "algorithm.inner.lr=1e12")
    with Keepers(config, begun(config, tmp_path / "run"), 2) as keepers:
        pass
    assert keepers.results == [None, None]
    assert keepers.failures[0][0] == "TrainingError"
    assert "meta-steps in a row were skipped" in keepers.failures[0][1]
    assert len(keepers.run.starts()) == 1


def test_a_process_that_crashes_again_and_again_ends_the_run_with_its_reason(data, tmp_path):
    config = configured(data, "model={kind: 'helpers.models:breaks'}")
    with Keepers(config, begun(config, tmp_path / "run"), 2) as keepers:
        pass
    assert keepers.results == [None, None]
    kind, message = keepers.failures[0]
    assert kind == "TrainingError"
    assert "4 times in a row" in message
    assert "ZeroDivisionError" in message


def test_a_process_that_is_stopped_while_it_imports_ends_with_its_keeper() -> None:
    """A spare that could not notice would stay behind for ever."""
    keeper = """
import os, signal, sys, time
from pathlib import Path
from imaml_dist.distributed.rank_process import RankProcess
process = RankProcess()
maps = Path(f"/proc/{process.pid}/maps")
while "libtorch" not in maps.read_text():
    time.sleep(0.001)
os.kill(process.pid, signal.SIGSTOP)
assert not process.ready
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", keeper], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline, "it stayed behind"
        time.sleep(0.02)
