"""The pen: nothing waits for it, nothing is lost by a full disk, and what it cannot write in the end is an error."""

import json
import resource
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from imaml_dist.errors import StorageError
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.writer import RunWriter

BIG = 50_000
"""Bytes of a state; lines of metrics are smaller."""


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


@contextmanager
def full_disk(size):
    """No file may become larger: what a full disk does to a process, by the operating system's own means."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def slow_disk(monkeypatch):
    """Checkpoints wait until the block ends."""
    freed, save = threading.Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args: freed.wait(30) and save(*args))
    try:
        yield
    finally:
        freed.set()


def state(step):
    return {"x": torch.full((BIG // 4,), float(step))}, {"ledger": {"steps": step}}


def write(pen, *steps, best=-1):
    for step in steps:
        pen.checkpoint(step, *state(step), best)


def lines(run):
    return [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def settled(pen, failures):
    until(lambda: pen.failures >= failures)


def written(run, step):
    until(lambda: checkpoints.steps(run.checkpoints) == [step])


def test_everything_is_on_disk_when_it_is_closed(run):
    pen = RunWriter(run, keep=9)
    pen.record({"step": 0})
    write(pen, 1)
    pen.close()
    assert lines(run) == [0]
    tensors, _ = checkpoints.load_newest(run.checkpoints)
    assert torch.equal(tensors["x"], state(1)[0]["x"])


def test_no_step_waits_for_a_slow_disk_and_of_those_that_wait_the_best_and_the_newest_are_written(run, monkeypatch):
    pen = RunWriter(run, keep=9)
    with slow_disk(monkeypatch):
        write(pen, 1)
        until(lambda: not pen._owed)  # the thread has begun with it
        write(pen, 2, best=1)
        write(pen, 3, 4, 5, best=3)
        assert checkpoints.steps(run.checkpoints) == []
    pen.close()
    assert checkpoints.steps(run.checkpoints) == [1, 3, 5]


def test_a_full_disk_that_is_freed_costs_nothing_that_is_needed(run):
    pen = RunWriter(run, keep=1)
    write(pen, 1)
    written(run, 1)
    pen.record({"step": 0})
    with full_disk(BIG // 2):
        pen.record({"step": 1})
        write(pen, 2, best=2)
        settled(pen, 1)
        write(pen, 3, best=2)
        settled(pen, 2)
    assert checkpoints.steps(run.checkpoints) == [1]
    write(pen, 4, best=2)
    pen.close()
    assert checkpoints.steps(run.checkpoints) == [2, 4], "the best, and the newest"
    assert not list(run.checkpoints.glob(".*")), "no part of another"
    assert lines(run) == [0, 1]


def test_lines_that_do_not_fit_leave_no_half_of_one_behind(run):
    pen = RunWriter(run, keep=1)
    pen.record({"step": 0})
    size = run.metrics_file.stat().st_size
    with full_disk(size + 5):
        pen.record({"step": 1})
        pen.record({"step": 2})
        assert run.metrics_file.stat().st_size == size
        assert pen.failures == 2
    pen.record({"step": 3})
    pen.close()
    assert lines(run) == [0, 1, 2, 3]


def test_what_is_owed_in_the_end_is_an_error_and_the_older_checkpoint_stays(run):
    pen = RunWriter(run, keep=1)
    write(pen, 1)
    pen.record({"step": 0})
    written(run, 1)
    with full_disk(BIG // 2):
        write(pen, 2)
        with pytest.raises(
            StorageError, match=r"cannot be written \(.*File too large.*free space and run the same command again"
        ):
            pen.close()
    assert checkpoints.load_newest(run.checkpoints)[1]["ledger"]["steps"] == 1


def test_a_defect_of_ours_is_not_lost_in_the_thread(run):
    pen = RunWriter(run, keep=1)
    pen.checkpoint(1, {"x": "no tensor"}, {}, -1)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        pen.close()


def test_a_best_checkpoint_that_cannot_be_written_is_not_pushed_out_by_a_newer_one(run):
    """The best one is larger here: the disk has room for the newer one alone, whose pruning would delete the best before."""
    pen = RunWriter(run, keep=1)
    write(pen, 1, best=1)
    written(run, 1)
    with full_disk(BIG // 2):
        write(pen, 2, best=2)
        settled(pen, 1)
        pen.checkpoint(3, {"x": torch.zeros(10)}, {"ledger": {"steps": 3}}, 2)
        settled(pen, 2)
        assert checkpoints.steps(run.checkpoints) == [1]
    pen.close()
    assert checkpoints.steps(run.checkpoints) == [2, 3]


def test_no_checkpoint_is_ahead_of_its_metrics(run):
    pen = RunWriter(run, keep=9)
    pen.record({"step": 0})
    size = run.metrics_file.stat().st_size
    with full_disk(size):
        pen.record({"step": 1})
    write(pen, 2)
    time.sleep(0.2)
    assert checkpoints.steps(run.checkpoints) == []
    pen.record({"step": 2})
    pen.close()
    assert checkpoints.steps(run.checkpoints) == [2]
