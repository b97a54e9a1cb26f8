"""Ray workers with a run directory on S3: a lost rank 0, a killed driver and storage that fails leave the bits of one process."""

import json
import os
import signal
import time
from contextlib import ExitStack

import pytest
from helpers.command import Command
from helpers.fault_proxy import Fault, FaultProxy
from helpers.runs import seen_elsewhere, tiny, train_alone, write_config
from helpers.s3_server import environment

from imaml_dist.errors import MissingError
from imaml_dist.storage.opening import open_storage

pytestmark = [pytest.mark.faults, pytest.mark.slow]

STEPS = 60


def starts(storage):
    """Starts of the training loop so far."""
    try:
        return [json.loads(line) for line in storage.read("starts.jsonl").splitlines()]
    except MissingError:
        return []


def wait_until(fulfilled, command, timeout=120):
    deadline = time.monotonic() + timeout
    while not (found := fulfilled()):
        assert command.process.poll() is None, f"{command.wait()}: {command.output}"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def steps_on_record(storage):
    return sum(storage.read(name).count(b"\n") for name, _ in storage.names("metrics/"))


def test_a_lost_rank_a_killed_driver_and_failing_storage(moto_bucket, data, tmp_path):
    gold = train_alone(tiny(data, steps=STEPS, checkpoint_every=5), tmp_path / "gold")
    url, options = moto_bucket
    config = write_config(
        tmp_path / "tiny.yaml", data, steps=STEPS, checkpoint_every=5, backend="ray", workers=2, compare_every=5
    )
    (tmp_path / "elsewhere").mkdir()
    faults = [Fault("503", on="PUT", every=7), Fault("lose", on="PUT", every=11), Fault("reset", every=5, after=10)]
    with FaultProxy(options.endpoint, *faults) as proxy:
        env = environment(home=tmp_path, AWS_ENDPOINT_URL_S3=proxy.url)
        storage = open_storage(f"{url}/r", options)
        command = ("train", str(config), "--run-dir", f"{url}/r")
        with ExitStack() as stack:  # what is left of the first ends while the second begins
            first = stack.enter_context(Command(*command, cwd=tmp_path, **env))
            wait_until(lambda: steps_on_record(storage) > 7, first)
            os.kill(starts(storage)[-1]["pids"][0], signal.SIGKILL)
            after = wait_until(lambda: starts(storage)[1:], first)[0]
            assert after["from"] == "memory", "what rank 0 had written on this machine was not lost with its process"
            wait_until(lambda: steps_on_record(storage) > after["step"] + 7, first)
            first.kill()
            second = stack.enter_context(Command(*command, cwd=tmp_path / "elsewhere", **env))
            assert second.wait() == 0, second.output
        assert proxy.counts["503"] > 0
        assert proxy.counts["lose"] > 0
    again = starts(storage)[2]
    assert "from" not in again
    assert again["step"] > 0
    assert seen_elsewhere(f"{url}/r", options) == (gold, list(range(STEPS)))
    assert json.loads(storage.read("summary.json"))["restarts"] == 2
