"""The same-bits promise without Ray: one process, gloo groups of 2, 3 and 5, interruptions and changes of size."""

import json

import pytest
import torch
from helpers.gloo import run_group
from helpers.runs import (
    error_of_training,
    fingerprint,
    raw_config,
    spoilt_worker,
    tiny,
    train_alone,
    train_in_a_group,
    train_in_a_group_with_slow_disk,
    train_spoilt_in_a_group,
)

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import resolve
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.stop import Stop
from imaml_dist.distributed.worker import Worker
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of


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


def test_every_rank_tests_the_same_checkpoint_however_long_it_takes_to_write(data, tmp_path):
    """Without validation the newest checkpoint is tested, which rank 0 may still be writing when the others are done."""
    expected = train_alone(tiny(data, "validate.tasks=0"), tmp_path / "alone")
    raw = raw_config(data) | {"validate": {"tasks": 0}}
    RunDirectory(tmp_path / "run").begin(tiny(data, "validate.tasks=0"))
    run_group(2, train_in_a_group_with_slow_disk, raw, str(tmp_path / "run"))
    assert fingerprint(tmp_path / "run") == expected


def test_ranks_that_do_not_begin_alike_are_stopped_at_once(data, tmp_path):
    raw = raw_config(data) | {"model": {"kind": "helpers.models:different_everywhere"}}
    run = RunDirectory(tmp_path / "run")
    run.begin(build_config(raw))
    said = run_group(2, error_of_training, raw, str(run.path))
    assert all("do not begin with the same meta-parameters" in s for s in said)
    assert not run.metrics_file.exists()


def test_tied_weights_train_and_resume(data, tmp_path):
    own = "model={kind: 'helpers.models:tied'}"
    expected = train_alone(tiny(data, own), tmp_path / "whole")
    train_alone(tiny(data, own, steps=4), tmp_path / "parts")
    assert train_alone(tiny(data, own), tmp_path / "parts")["state"] == expected["state"]


def test_a_learned_strength_is_part_of_the_promise(data, tmp_path):
    raw = raw_config(data)
    raw["algorithm"]["lam"] = {"kind": "kronecker", "init": 0.3, "learn": True, "lr": 0.05}
    config = resolve(build_config(raw), cuda=False)
    expected = train_alone(config, tmp_path / "alone")
    tensors, _ = checkpoints.load_newest(tmp_path / "alone" / "checkpoints")
    learned = {name: value for name, value in tensors.items() if name.startswith("algorithm.lam.")}
    start = Worker(config, RunDirectory(tmp_path / "unused"), Alone()).learner.own
    assert {f"algorithm.{name}" for name in start} == set(learned) != set()
    still = {name for name, value in start.items() if torch.equal(learned[f"algorithm.{name}"], value)}
    # Before batch normalisation a bias does not adapt, so its strength has no gradient.
    assert still <= {f"lam.blocks.{i}.0.bias.log_strengths" for i in range(4)}

    RunDirectory(tmp_path / "three").begin(config)
    run_group(3, train_in_a_group, raw, str(tmp_path / "three"))
    assert fingerprint(tmp_path / "three") == expected

    train_alone(tiny(data, f"algorithm.lam={raw['algorithm']['lam']}", steps=4), tmp_path / "parts")
    assert train_alone(config, tmp_path / "parts")["state"] == expected["state"]


def test_max_seconds_ends_a_run_with_a_validated_checkpoint(data, tmp_path):
    config = tiny(data, steps=10_000, max_seconds=1.0)
    run = RunDirectory(tmp_path / "run")
    run.begin(config)
    assert Worker(config, run, Alone()).run_to_end() is Stop.SECONDS
    last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    assert last["val_accuracy"] is not None
    assert checkpoints.steps(run.checkpoints)[-1] == last["step"] + 1 < 10_000
    assert run.evaluation_file.exists()


def test_skipped_steps_are_the_same_on_any_number_of_workers_and_through_a_resume(data, tmp_path):
    bad = {1: 4, 2: 5, 4: 7}
    raw = raw_config(data) | {"outer": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "schedule": "cosine"}}
    config = resolve(build_config(raw), cuda=False)
    for name in ("alone", "three", "parts"):
        RunDirectory(tmp_path / name).begin(config)
    spoilt_worker(config, tmp_path / "alone", Alone(), bad).run_to_end()
    expected = fingerprint(tmp_path / "alone")
    run_group(3, train_spoilt_in_a_group, raw, str(tmp_path / "three"), bad)
    assert fingerprint(tmp_path / "three") == expected

    stopped = spoilt_worker(config, tmp_path / "parts", Alone(), bad)
    step = stopped._meta_step

    def stop_after_a_skipped_step(number):
        if number == 2:
            stopped.run.request_stop()
        return step(number)

    stopped._meta_step = stop_after_a_skipped_step
    stopped.run_to_end()
    stopped.run.begin(config)
    spoilt_worker(config, tmp_path / "parts", Alone(), bad).run_to_end()
    assert fingerprint(tmp_path / "parts") == expected
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["updates"] for line in lines] == [1, 2, 2, 3, 3, 4]


def test_several_workers_begin_warm_alike(data, tmp_path):
    train_alone(tiny(data, steps=2, seed=5), tmp_path / "source")
    warm = {"path": str(tmp_path / "source"), "skip": ["head"]}
    expected = train_alone(tiny(data, f"warm_start={warm}"), tmp_path / "alone")
    RunDirectory(tmp_path / "two").begin(tiny(data, f"warm_start={warm}"))
    run_group(2, train_in_a_group, raw_config(data) | {"warm_start": warm}, str(tmp_path / "two"))
    assert fingerprint(tmp_path / "two") == expected
