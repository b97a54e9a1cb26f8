"""Reading ahead: the same batches in the same order, whatever the depth; errors arrive where they belong; threads end."""

import threading
import time

import pytest
import torch

from imaml_dist.data.ahead import Ahead
from imaml_dist.errors import DataError
from imaml_dist.tasks.episode import EpisodeBatch

REQUESTS = [(step, range(2 * chunk, 2 * chunk + 2)) for step in range(4) for chunk in range(3)]


class Source:
    def __init__(self, fails_at=None):
        self.asked, self._fails_at = [], fails_at

    def episodes(self, step, tasks):
        self.asked.append((step, tasks))
        if (step, tasks) == self._fails_at:
            raise DataError("damaged")
        time.sleep(0.001 * ((7 * step + tasks.start) % 5))  # later ones may be ready sooner
        x = torch.tensor([[[float(step)], [float(task)]] for task in tasks])
        return EpisodeBatch(
            x, torch.zeros(2, 2, dtype=torch.int64), x, torch.zeros(2, 2, dtype=torch.int64), torch.tensor(list(tasks))
        )


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_batches_come_in_order_and_all_of_them(depth):
    with Ahead(Source(), REQUESTS, depth) as ahead:
        got = [(int(batch.support_x[0, 0, 0]), batch.index.tolist()) for batch in ahead]
    assert got == [(step, list(tasks)) for step, tasks in REQUESTS]


def test_it_works_ahead_but_not_further_than_told():
    source = Source()
    with Ahead(source, ((step, range(2)) for step in range(10**9)), 3) as ahead:
        for _ in range(5):
            next(ahead)
        time.sleep(0.1)
        assert {step for step, _ in source.asked} == set(range(8))


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_where_its_batch_would_have_come(depth):
    with Ahead(Source(fails_at=REQUESTS[2]), REQUESTS, depth) as ahead:
        next(ahead), next(ahead)
        with pytest.raises(DataError, match="damaged"):
            next(ahead)


def test_no_thread_is_left():
    before = threading.active_count()
    with Ahead(Source(), REQUESTS, 4) as ahead:
        next(ahead)
    assert threading.active_count() == before
