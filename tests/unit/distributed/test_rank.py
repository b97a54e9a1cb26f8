"""What the threads of a rank's process say and do while its main thread lets the worker go."""

import socket
from types import SimpleNamespace

import pytest

from imaml_dist.distributed import rank
from imaml_dist.distributed.channel import Channel
from imaml_dist.distributed.rank import Rank


class Ending(Rank):
    """The worker is gone at the second look, and the process at the third."""

    def __init__(self, channel, worker):
        super().__init__(channel)
        self.looks = [worker, None]

    @property
    def _worker(self):
        if not self.looks:
            raise SystemExit
        return self.looks.pop(0)

    @_worker.setter
    def _worker(self, worker):
        pass


@pytest.fixture
def worker():
    return SimpleNamespace(state=SimpleNamespace(step=7), save_now=False)


def test_signs_of_life_go_on(worker, monkeypatch):
    monkeypatch.setattr(rank, "BEAT_S", 0.0)
    keeper, ours = (Channel(end) for end in socket.socketpair())
    with pytest.raises(SystemExit):
        Ending(ours, worker)._beat()
    assert [beat["step"] for beat in keeper.receive(1)] == [7, -1]


def test_a_request_to_save_is_heard(worker):
    Ending(Channel(socket.socketpair()[0]), worker)._save()
    assert worker.save_now
