"""The same-bits promise without Ray: one process, gloo groups of 2, 3 and 5, interruptions and changes of size."""

import json

import pytest
from helpers.datasets import write_blobs
from helpers.gloo import run_group
from helpers.runs import fingerprint, raw_config, tiny, train_alone, train_in_a_group

from imaml_dist.distributed.reduction import Alone
from imaml_dist.distributed.worker import Stop, Worker
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return folder


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    return train_alone(tiny(data), tmp_path_factory.mktemp("gold") / "run")


def in_a_group(data, path, world, **run):
    RunDirectory(path).begin(tiny(data, **run))
    run_group(world, train_in_a_group, raw_config(data, **run), str(path))
    return fingerprint(path)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_workers_gives_the_bits_of_one(data, gold, tmp_path, world):
    assert in_a_group(data, tmp_path / "run", world) == gold


def test_fast_reduction_over_three_workers_differs_so_the_promise_can_fail(data, tmp_path):
    alone = train_alone(tiny(data, reduction="fast"), tmp_path / "alone")
    assert in_a_group(data, tmp_path / "three", 3, reduction="fast")["params"] != alone["params"]


def test_parameters_move_and_seeds_differ(data, gold, tmp_path):
    start = Worker(tiny(data), RunDirectory(tmp_path / "unused"), Alone())
    assert sha256_of({f"model.{n}": t for n, t in start.learner.model.state_dict().items()}) != gold["params"]
    assert train_alone(tiny(data, seed=1), tmp_path / "seed")["params"] != gold["params"]


def test_a_stop_in_the_middle_and_a_change_of_size_change_nothing(data, gold, tmp_path):
    path = tmp_path / "run"
    config = tiny(data)
    run = RunDirectory(path)
    run.begin(config)
    worker = Worker(config, run, Alone())
    step = worker._meta_step

    def stop_after_three(number):
        record = step(number)
        if number == 2:
            run.request_stop()
        return record

    worker._meta_step = stop_after_three
    assert worker.run_to_end() is Stop.INTERRUPTED
    assert checkpoints.steps(run.checkpoints)[-1] == 3
    assert not run.evaluation_file.exists()
    assert in_a_group(data, path, 2) == gold
    lines = [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]
    assert lines == list(range(6))
    assert [s["step"] for s in run.starts()] == [0, 3]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(data, gold, tmp_path):
    path = tmp_path / "run"
    train_alone(tiny(data, steps=4), path)
    newest = path / "checkpoints" / "step-00000004" / checkpoints.TENSORS
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert train_alone(tiny(data), path) == gold
    assert [s["step"] for s in RunDirectory(path).starts()] == [0, 3]


def test_max_seconds_ends_a_run_with_a_validated_checkpoint(data, tmp_path):
    config = tiny(data, steps=10_000, max_seconds=1.0)
    run = RunDirectory(tmp_path / "run")
    run.begin(config)
    assert Worker(config, run, Alone()).run_to_end() is Stop.SECONDS
    last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    assert last["val_accuracy"] is not None
    assert checkpoints.steps(run.checkpoints)[-1] == last["step"] + 1 < 10_000
    assert run.evaluation_file.exists()
