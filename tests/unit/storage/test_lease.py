"""One holder at a time, whoever fails; on folders and on real S3 servers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import SERVERS, new_bucket
from helpers.fault_proxy import Fault, FaultProxy

from imaml_dist.errors import LeaseLostError, MissingBucketError, StorageError
from imaml_dist.storage import lease as module
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.lease import Lease
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.protocol import ABSENT

NAME = ".writer.lock"


@pytest.fixture(params=["folder", *SERVERS])
def storage(request, tmp_path):
    if request.param == "folder":
        return Folder(tmp_path / "run")
    request.getfixturevalue("aws")
    url, options = new_bucket(request.getfixturevalue(request.param))
    return open_storage(f"{url}/run", options)


def lease(storage, label="", seconds=1.0):
    return Lease(storage, NAME, label, seconds)


def test_a_second_one_is_refused_until_the_first_gives_it_back(storage):
    first = lease(storage)
    assert first.acquire() == ""
    assert lease(storage).acquire() is None
    first.confirm()
    first.release()
    second = lease(storage, seconds=3600.0)
    assert second.acquire() == "", "nobody was lost"
    second.release()


def test_of_many_at_once_one_holds_it_at_a_time(storage):
    holding, most = [], []

    def take(number):
        mine = lease(storage, str(number))
        assert mine.acquire(wait=60) == ""
        holding.append(number)
        most.append(len(holding))
        time.sleep(0.02)
        holding.remove(number)
        mine.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 4


def test_one_that_is_not_renewed_is_taken_and_its_holder_finds_out(storage, monkeypatch):
    first = lease(storage, "first", seconds=3600.0)  # not renewed for twenty minutes
    first.acquire()
    second = lease(storage)
    assert second.acquire() == "first"
    for ask in (first.confirm, first.check):
        with pytest.raises(LeaseLostError, match="is being written by another process, which took this one for dead"):
            ask()
    first.release()
    second.confirm()
    second.release()


def test_one_whose_process_is_gone_is_taken_at_once(tmp_path):
    holder = f"""
import os, signal
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.lease import Lease
Lease(Folder({str(tmp_path)!r}), {NAME!r}, "the killed", 3600.0).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", holder], timeout=60, check=False).returncode == -signal.SIGKILL
    next_one = lease(Folder(tmp_path), seconds=3600.0)
    assert next_one.acquire() == "the killed"
    next_one.release()


def test_one_that_was_left_is_for_the_same_label_in_the_same_process(storage):
    first = lease(storage, "mine", seconds=3600.0)
    first.acquire()
    first.leave()
    again = lease(storage, "mine", seconds=3600.0)
    assert again.acquire() == "mine"
    with pytest.raises(LeaseLostError):
        first.confirm()
    again.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 9000, b'{"pid": "x", "machine": 1}', b"[" * 5000])
def test_whatever_lies_there_is_a_holder_about_whom_nothing_is_known(storage, content):
    storage.write(NAME, content)
    mine = lease(storage)
    assert mine.acquire() == ""
    assert json.loads(storage.read(NAME))["pid"] == os.getpid()
    mine.release()


def test_answers_that_are_lost_do_not_lose_it(moto_bucket):
    url, options = moto_bucket
    with FaultProxy(options.endpoint, Fault("lose", on="PUT", every=2)) as proxy:
        through = open_storage(f"{url}/run", type(options)(endpoint=proxy.url))
        mine = lease(through, seconds=3600.0)
        assert mine.acquire() == ""
        for _ in range(3):
            mine.confirm()
        assert proxy.counts["lose"] >= 2
        mine.release()


class Losing(Folder):
    """Carries out what is asked, and then fails."""

    def __init__(self, path, fail):
        super().__init__(path)
        self.fail = fail

    def write(self, name, content, *, only_if=None):
        version = super().write(name, content, only_if=only_if)
        if self.fail(only_if):
            raise StorageError("no answer")
        return version


def test_an_answer_that_is_lost_before_storage_goes_away_does_not_lose_it(tmp_path):
    failing = []
    mine = lease(Losing(tmp_path, lambda only_if: failing and failing.pop()), seconds=3600.0)
    mine.acquire()
    failing.append(True)
    with pytest.raises(StorageError, match="no answer"):
        mine.confirm()
    mine.confirm()
    mine.release()


def test_nor_does_one_that_is_lost_when_it_is_taken(tmp_path):
    failing = [True]
    mine = lease(Losing(tmp_path, lambda only_if: failing and failing.pop()), seconds=5.0)
    assert mine.acquire(patience=60.0) == ""
    mine.confirm()
    mine.release()


def test_giving_it_back_takes_nothing_from_the_next_holder(tmp_path):
    """The answer to it may come late: then the next one holds it already."""
    first, second = lease(Folder(tmp_path), seconds=3600.0), lease(Folder(tmp_path), seconds=3600.0)
    first.acquire()
    first.release()
    assert second.acquire() == ""
    first.release()
    second.confirm()
    second.release()


def test_one_that_could_not_be_renewed_for_too_long_is_not_relied_on(tmp_path):
    mine = lease(Losing(tmp_path, lambda only_if: only_if not in (None, ABSENT)), seconds=0.3)
    mine.acquire()
    mine.check()
    time.sleep(0.5)
    with pytest.raises(StorageError, match=r"could not be renewed for 0\.3 s"):
        mine.check()
    mine.leave()


@pytest.mark.parametrize(("heeded", "told"), [("none", "If-None-Match"), ("absence", r"\(If-Match")])
def test_storage_that_heeds_no_conditions_is_refused(tmp_path, heeded, told):
    class Heedless(Folder):
        def write(self, name, content, *, only_if=None):
            return super().write(name, content, only_if=only_if if (heeded, only_if) == ("absence", ABSENT) else None)

    with pytest.raises(StorageError, match=f"{told}.*cannot keep two writers apart"):
        lease(Heedless(tmp_path)).acquire()


def test_a_bucket_that_does_not_exist_is_told(moto, aws):
    from imaml_dist.storage.options import StorageOptions

    with pytest.raises(MissingBucketError):
        lease(open_storage("s3://no-such-bucket/run", StorageOptions(endpoint=moto))).acquire()


def test_a_process_id_that_is_used_again_is_another_process(monkeypatch):
    ours = module._process()
    assert not module._is_gone(ours)
    assert module._is_gone({**ours, "born": "1"})
    assert not module._is_gone({**ours, "machine": "elsewhere"})
