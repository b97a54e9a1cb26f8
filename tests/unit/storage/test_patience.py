"""How long storage tries, and how it waits."""

import math
import os
import threading
import time

import pytest

from imaml_dist.storage import patience as module
from imaml_dist.storage.patience import FIRST_WAIT_S, LONGEST_WAIT_S, Counters, Patience, counters


@pytest.fixture
def clock(monkeypatch):
    """A clock that sleeping advances; its list has the pauses."""

    class Clock(list):
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.append(seconds)
            self.now += seconds + 1e-9  # as every clock, which is never early

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def exhausted(patience: Patience) -> int:
    """Tries until the budget is spent."""
    tries = 1
    while patience.wait():
        tries += 1
    return tries


def test_the_whole_budget_is_used_and_no_more(clock):
    patience = Patience(60)
    tries = exhausted(patience)
    assert math.isclose(sum(clock), 60, rel_tol=1e-6)
    assert patience.failures == patience.total_failures == tries
    assert tries < 60


def test_without_patience_there_is_one_try(clock):
    assert exhausted(Patience(0)) == 1


def test_time_that_the_tries_take_counts(clock):
    patience = Patience(60)
    clock.now += 61
    assert not patience.wait()
    assert list(clock) == []


def test_progress_makes_the_budget_whole_again(clock):
    patience = Patience(60)
    exhausted(patience)
    patience.progress()
    assert (patience.failures, patience.spent) == (0, 0)
    assert patience.wait()
    assert patience.failures == 1
    assert patience.total_failures > 1


def test_time_of_others_does_not_count(clock):
    patience = Patience(60)
    clock.now += 100
    patience.excuse(100)
    assert patience.spent == 0
    assert patience.wait()


def test_waits_have_full_jitter(clock, monkeypatch):
    asked = []
    monkeypatch.setattr(module.random, "uniform", lambda low, high: asked.append((low, high)) or high)
    exhausted(Patience(60))
    assert {low for low, _ in asked} == {0}
    assert [high for _, high in asked[:3]] == [FIRST_WAIT_S * 2, FIRST_WAIT_S * 4, FIRST_WAIT_S * 8]
    assert max(high for _, high in asked) == LONGEST_WAIT_S
    assert [high for _, high in asked] == sorted(high for _, high in asked)


def test_waits_differ_between_workers(clock):
    for _ in range(50):
        Patience(60).wait()
    assert all(0 <= pause <= 2 * FIRST_WAIT_S for pause in clock)
    assert len(set(clock)) > 40


def test_waits_are_counted(clock):
    before = counters.snapshot()
    tries = exhausted(Patience(10))
    after = counters.snapshot()
    assert after["retries"] - before["retries"] == tries - 1
    assert math.isclose(after["seconds_waited"] - before["seconds_waited"], 10, rel_tol=1e-6)


def test_counters_count_from_several_threads():
    own = Counters()
    threads = [
        threading.Thread(target=lambda: [own.add(requests=1, bytes_read=2) for _ in range(2000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.snapshot() == {
        "requests": 8000, "bytes_read": 16000, "bytes_written": 0, "retries": 0, "seconds_waited": 0
    }  # fmt: skip


def test_a_fork_counts_for_itself_even_if_a_thread_was_counting():
    counters.add(requests=1)
    with counters._lock:
        child = os.fork()
        if not child:
            os._exit(counters.snapshot()["requests"])
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not done[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0)
