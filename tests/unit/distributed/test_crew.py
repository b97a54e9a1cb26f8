"""Keepers talk through a store that listens on one address, and lines to processes carry whole messages."""

import socket
import threading

import psutil
import pytest
from torch.distributed import TCPStore

from imaml_dist.distributed.channel import Channel
from imaml_dist.distributed.crew import Crew, connect, open_store
from imaml_dist.distributed.interface import interface_of
from imaml_dist.errors import PeerLostError

HERE = "127.0.0.1"


@pytest.fixture
def crew():
    """Two keepers."""
    store, port = open_store(HERE)
    return connect(HERE, port, 0, 2, store), connect(HERE, port, 1, 2)


def test_the_store_listens_on_the_given_address_alone():
    store, port = open_store(HERE)
    found = [
        c.laddr.ip
        for c in psutil.Process().net_connections()
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    assert found == [HERE]
    del store


def test_all_hear_what_each_says_as_it_gets_ready(crew):
    first, second = crew
    found = []
    other = threading.Thread(target=lambda: found.append(second.gather(0, "lost", 20)))
    other.start()
    found.append(first.gather(0, "", 20))
    other.join()
    assert found == [["", "lost"]] * 2


def test_one_that_does_not_come_is_named(crew):
    with pytest.raises(PeerLostError, match=r"ranks \[1\] did not come back within 0.2 s"):
        crew[0].gather(0, "", 0.2)


def test_what_is_declared_first_about_a_generation_stands(crew):
    first, second = crew
    assert first.over(0) is None
    second.end(0)
    first.end(0, failed=True)
    assert first.over(0) == second.over(0) == "lost"
    assert first.over(1) is None


def test_all_have_finished_when_each_has(crew):
    first, second = crew
    first.finished(3)
    assert not first.all_finished(3), "the other has not"
    second.finished(3)
    assert second.all_finished(3), "it has said so before it asks"
    assert first.all_finished(3)


def test_a_store_that_is_gone_is_a_lost_peer():
    store, port = open_store(HERE)
    crew = Crew(TCPStore(HERE, port, is_master=False), 1, 2)
    del store
    with pytest.raises(PeerLostError):
        crew.over(0)


def test_messages_arrive_whole_in_order_and_a_hang_up_is_noticed():
    ours, theirs = (Channel(end) for end in socket.socketpair())
    assert theirs.receive(0) == []
    long = "x" * 3_000_000
    sender = threading.Thread(target=lambda: [ours.send(n=1), ours.send(text=long), ours.send(n=3)])
    sender.start()
    found = []
    while len(found) < 3:
        found += theirs.receive(5)
    sender.join()
    assert found == [{"n": 1}, {"text": long}, {"n": 3}]
    ours.close()
    assert theirs.receive(5) == []
    assert not theirs.open
    theirs.send(n=4)
    assert theirs.receive(5) == []


def test_the_interface_of_an_address():
    assert interface_of(HERE) == "lo"
    assert interface_of("203.0.113.7") is None
