"""S3 that misbehaves: reads end with the right bytes at little more than their cost, or with one sentence that says why."""

import dataclasses
import os
import re
import signal
import threading
import time

import pytest
import yaml
from helpers import s3_server
from helpers.command import Command
from helpers.fault_proxy import Fault, FaultProxy
from helpers.runs import raw_config

from imaml_dist.errors import ChangedError, MissingError, StorageError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.patience import counters
from imaml_dist.storage.protocol import ABSENT, Storage

CONTENT = os.urandom(600_000)
QUICK = {"retry_seconds": 2.0, "connect_timeout": 0.5, "read_timeout": 0.3}
HASTY = QUICK | {"retry_seconds": 0.5}
HTTP_FAULTS = ["cut", "reset", "stall", "trickle", "refuse", "lose", "503"]


@pytest.fixture
def behind(bucket):
    """Behind a proxy with faults: (proxy, storage); an object `a` is there."""
    yield from _behind(bucket)


@pytest.fixture
def behind_moto(moto_bucket):
    """As `behind`, of moto only."""
    yield from _behind(moto_bucket)


def _behind(bucket):
    url, options = bucket
    open_storage(url, options).write("a", CONTENT)
    proxies = []

    def make(*faults: Fault, **settings) -> tuple[FaultProxy, Storage]:
        proxy = FaultProxy(options.endpoint, *faults).__enter__()
        proxies.append(proxy)
        storage = open_storage(url, dataclasses.replace(options, endpoint=proxy.url, **(QUICK | settings)))
        storage._client.get()  # which may take longer than these tests have patience
        return proxy, storage

    make.directly = open_storage(url, options)
    yield make
    for proxy in proxies:
        proxy.__exit__(None, None, None)


@pytest.mark.parametrize("kind", HTTP_FAULTS)
def test_a_read_goes_on_where_it_stopped(behind, kind):
    proxy, storage = behind(Fault(kind, every=2, after=150_000, pause=0.1))
    before = counters.snapshot()
    assert storage.read("a") == CONTENT
    assert storage.read("a", 1000, 500_000) == CONTENT[1000:500_000]
    assert storage.read("a") == CONTENT
    size = 2 * len(CONTENT) + 499_000
    assert proxy.counts[kind] >= 1
    assert size <= proxy.sent["GET"] <= 1.2 * size
    assert counters.retries - before["retries"] == proxy.counts[kind]
    assert counters.bytes_read - before["bytes_read"] == size


@pytest.mark.parametrize("kind", ["cut", "reset", "stall", "trickle"])
def test_a_body_that_never_comes_whole_is_read_bit_by_bit(behind_moto, kind):
    proxy, storage = behind_moto(Fault(kind, after=130_000, pause=0.1))
    assert storage.read("a") == CONTENT
    assert proxy.counts[kind] == 4
    assert proxy.sent["GET"] <= 1.2 * len(CONTENT)


@pytest.mark.parametrize("kind", ["stall", "trickle"])
def test_a_stream_hands_on_what_has_come(behind_moto, kind):
    _, storage = behind_moto(Fault(kind, after=300_000), read_timeout=5.0)
    began, got = time.monotonic(), 0
    for piece in storage.stream("a"):
        got += len(piece)
        if got >= 300_000:
            break
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", HTTP_FAULTS)
def test_a_server_that_never_answers_is_given_up(behind, kind):
    _, storage = behind(Fault(kind, after=0, pause=0.1), **HASTY)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"/a: gave up after \d+ failures in \d+ seconds") as error:
        storage.read("a")
    assert "(storage.retry_seconds is 0.5), the last one" in str(error.value)
    assert "check the endpoint and the network, and run the command again" in str(error.value)
    failures, seconds = map(int, re.findall(r"after (\d+) failures in (\d+) seconds", str(error.value))[0])
    assert failures >= (1 if kind in ("stall", "trickle") else 2)
    assert seconds <= 3
    assert time.monotonic() - began < 4


def test_a_server_that_is_not_there_is_given_up(aws):
    storage = open_storage("s3://bucket", StorageOptions(endpoint=f"http://127.0.0.1:{s3_server.free_port()}", **HASTY))
    for ask in (storage.read, storage.stat, storage.remove, lambda name: storage.write(name, b"1")):
        with pytest.raises(StorageError, match=r"s3://bucket/a: gave up after \d+ failures .*EndpointConnectionError"):
            ask("a")


def test_a_server_that_dies_in_mid_read(aws):
    from conftest import new_bucket

    with s3_server.moto_server() as server:
        url, options = new_bucket(server.url)
        storage = open_storage(url, dataclasses.replace(options, **HASTY))
        storage.write("a", bytes(30_000_000))
        stream = storage.stream("a")
        next(stream)
        server.kill()
        with pytest.raises(StorageError, match=r"gave up after \d+ failures"):
            list(stream)


def test_without_patience_a_failure_is_final(behind_moto):
    proxy, storage = behind_moto(Fault("503"), retry_seconds=0)
    with pytest.raises(StorageError, match=r"gave up after 1 failures .*the last one 503 SlowDown"):
        storage.read("a")
    assert proxy.counts["GET"] == 1


def test_time_that_the_reader_takes_does_not_count(behind_moto):
    proxy, storage = behind_moto(Fault("cut", times=1, after=100_000), retry_seconds=0.3)
    size = 0
    for piece in storage.stream("a"):
        size += len(piece)
        if size <= 100_000:
            time.sleep(0.4)
    assert size == len(CONTENT)
    assert proxy.counts["cut"] == 1


@pytest.mark.parametrize("on", ["HEAD", "LIST", "DELETE", "PUT"])
@pytest.mark.parametrize("kind", ["refuse", "lose", "503"])
def test_every_request_is_tried_again(behind, on, kind):
    proxy, storage = behind(Fault(kind, on=on, times=2))
    storage.write("b", b"123")
    assert storage.stat("b").size == 3
    assert [name for name, _ in storage.names()] == ["a", "b"]
    storage.remove("b")
    assert proxy.counts[kind] == 2


@pytest.mark.parametrize("kind", ["refuse", "lose", "503"])
def test_a_write_whose_answer_is_lost_succeeds(behind, kind, tmp_path):
    _, storage = behind(Fault(kind, on="PUT", every=2))
    (tmp_path / "file").write_bytes(CONTENT)
    first = storage.write("first", CONTENT, only_if=ABSENT)
    second = storage.write("second", tmp_path / "file", only_if=ABSENT)  # the one that is broken
    assert first == second == storage.stat("second").version
    assert storage.write("second", b"new", only_if=second) == storage.stat("second").version
    assert storage.read("second") == b"new"


def test_a_lost_answer_does_not_hide_a_faster_writer(behind):
    _, storage = behind(
        Fault("call", on="PUT", every=2, action=lambda: behind.directly.write("b", b"faster")),
        Fault("503", on="PUT", every=1, times=1),
    )
    with pytest.raises(ChangedError, match="is there already; another writer was faster"):
        storage.write("b", b"slower", only_if=ABSENT)
    assert storage.read("b") == b"faster"


@pytest.mark.parametrize("only_if", ["the version", None])
def test_an_object_that_is_replaced_in_mid_read_is_refused(behind, only_if):
    replace = Fault("call", every=2, action=lambda: behind.directly.write("a", os.urandom(len(CONTENT))))
    _, storage = behind(replace, Fault("cut", after=100_000))
    version = storage.stat("a").version if only_if else None
    with pytest.raises(ChangedError, match="/a was changed since it was first looked at; read it again"):
        storage.read("a", version=version)


def test_an_object_that_is_removed_in_mid_read_is_missing(behind):
    remove = Fault("call", every=2, action=lambda: behind.directly.remove("a"))
    _, storage = behind(remove, Fault("cut", after=100_000))
    with pytest.raises(MissingError):
        storage.read("a")


def test_a_server_without_ranged_reads_is_refused_before_its_bytes_are_read(behind_moto):
    behind_moto.directly.write("large", bytes(8_000_000))
    proxy, storage = behind_moto(Fault("bad_range"))
    with pytest.raises(StorageError, match=r"bytes from 0 on were asked for, .* the whole object; it cannot be used"):
        storage.read("large", 0, 10)
    with pytest.raises(StorageError, match=r"bytes from 5 on were asked for, .* without ranged reads"):
        storage.read("large", 5)
    assert proxy.sent["GET"] < 8_000_000


def test_bits_that_flip_are_not_for_storage_to_see(behind_moto):
    _, storage = behind_moto(Fault("flip", after=1000))
    got = storage.read("a")
    assert [i for i, (a, b) in enumerate(zip(got, CONTENT, strict=True)) if a != b] == [1000]


def test_a_clock_that_is_wrong_is_measured(behind_moto):
    proxy, storage = behind_moto(Fault("skew", on="all"))
    for ask in (
        storage.read,
        storage.stat,
        lambda name: list(storage.names(name)),
        lambda name: storage.write(name, b"1"),
    ):
        with pytest.raises(StorageError, match=r"which is .* seconds ahead of its own; synchronise it") as error:
            ask("a")
        assert abs(int(re.findall(r"which is (\d+) seconds", str(error.value))[0]) - 3600) <= 2
    assert (
        proxy.counts.total() - proxy.counts["skew"] - proxy.counts["connections"] == 5
    )  # a HEAD is asked again by GET


@pytest.mark.parametrize(("ask", "refusals"), [("read", 1), ("stat", 3), ("remove", 1)])
def test_credentials_that_expired_are_renewed_once(behind_moto, ask, refusals):
    # An answer to HEAD does not say why: the library looks whether the bucket is elsewhere, then we ask by GET.
    proxy, storage = behind_moto(Fault("expired", on="all", times=refusals))
    before, client = counters.snapshot(), storage._client.get()
    getattr(storage, ask)("a")
    assert storage._client.get() is not client
    assert counters.retries == before["retries"]
    assert proxy.counts["expired"] == refusals


def test_renewed_credentials_are_those_of_the_environment_now(behind_moto, monkeypatch):
    _, storage = behind_moto(Fault("expired", on="all", times=1))
    storage._client.get()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    storage.read("a")
    assert storage._client.get()._request_signer._credentials.access_key == "renewed"


def test_credentials_that_stay_expired(behind_moto):
    proxy, storage = behind_moto(Fault("expired", on="all"))
    for ask in (storage.read, storage.stat):
        with pytest.raises(StorageError, match=r"the credentials have expired \(ExpiredToken\).*; log in again"):
            ask("a")
    assert proxy.counts["GET"] == 4


def test_trying_again_is_logged_but_not_each_time(behind_moto, caplog):
    _, storage = behind_moto(Fault("503", times=4))
    storage.read("a")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("imaml_dist")] == [
        f"{storage.url}/a: 503 SlowDown; trying again (1)"
    ]


def test_ctrl_c_does_not_wait_for_what_is_on_its_way(moto_bucket, data, tmp_path):
    url, options = moto_bucket
    for path in data.iterdir():
        open_storage(url, options).write(path.name, path)
    asked, done = [], threading.Event()

    def stand_still() -> None:
        asked.append(1)
        if len(asked) > 1:  # the first one is about the index
            done.wait(120)

    with FaultProxy(options.endpoint, Fault("call", on="HEAD", action=stand_still)) as proxy:
        config = raw_config(url) | {"storage": {"endpoint": proxy.url, "read_timeout": 60, "cache": str(tmp_path)}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with Command(
            "freeze-tasks", "config.yaml", "--out", "tasks", cwd=tmp_path, **s3_server.environment(tmp_path)
        ) as command:
            deadline = time.monotonic() + 60
            while len(asked) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)
            command.kill(signal.SIGINT)
            began = time.monotonic()
            assert command.wait() == 130, command.output
            assert time.monotonic() - began < 10
        done.set()
    assert command.output == "imaml: interrupted\n"
