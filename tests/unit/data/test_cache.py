"""The node's cache: one fetch for all processes, never more than the budget, and nothing half-written is ever used."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest

from imaml_dist.data.cache import NodeCache
from imaml_dist.errors import StorageError
from imaml_dist.storage.local import exclusive


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def content_of(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def never() -> bytes:
    raise AssertionError("fetched again")


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("blocks/??/*"))


def test_what_is_there_is_not_fetched_again(tmp_path):
    cache = NodeCache(tmp_path, 10_000)
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))[0]) == content_of(1)
    assert bytes(NodeCache(tmp_path, 10_000).get(key_of(1), 1000, never)[0]) == content_of(1)
    assert (cache.counters.hits, cache.counters.misses) == (0, 1)
    assert cache.has(key_of(1)) and not cache.has(key_of(2))


def _process(folder, log, start):
    def fetch():
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.2)
        return content_of(7, 100_000)

    start.wait()
    cache = NodeCache(folder, 10**6)
    assert bytes(cache.get(key_of(7), 100_000, fetch)[0]) == content_of(7, 100_000)


def test_processes_of_a_node_fetch_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    processes = [context.Process(target=_process, args=(tmp_path / "cache", tmp_path / "log", start)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "x"


def test_threads_of_a_process_fetch_once(tmp_path):
    cache, fetched = NodeCache(tmp_path, 10**6), []

    def fetch():
        fetched.append(1)
        time.sleep(0.05)
        return content_of(3)

    threads = [threading.Thread(target=cache.get, args=(key_of(3), 1000, fetch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_the_budget_is_kept_and_the_least_recently_used_goes_first(tmp_path):
    cache = NodeCache(tmp_path, 5_000)
    held, mapped = cache.get(key_of(0), 1000, lambda: content_of(0))
    assert mapped
    for number in range(1, 5):
        cache.get(key_of(number), 1000, lambda number=number: content_of(number))
    for age, number in enumerate([3, 0, 4, 2, 1]):  # 3 is the oldest, then 0
        os.utime(tmp_path / "blocks" / key_of(number)[:2] / key_of(number), (1000 + age, 1000 + age))
    cache.get(key_of(5), 2000, lambda: content_of(5, 2000))
    assert used(tmp_path) <= 5_000
    assert [number for number in range(6) if cache.has(key_of(number))] == [1, 2, 4, 5]
    assert bytes(held) == content_of(0)  # evicted, and still readable for who has it
    assert cache.counters.evicted == 2


def test_what_is_larger_than_the_budget_is_handed_out_and_not_kept(tmp_path, caplog):
    cache = NodeCache(tmp_path, 500)
    for _ in range(2):
        assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))[0]) == content_of(1)
    assert used(tmp_path) == 0 and cache.counters.misses == 2
    assert len([r for r in caplog.records if "budget is 500 bytes" in r.getMessage()]) == 1


def _on_a_full_disk(folder, result):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    got, _ = NodeCache(folder, 10**6).get(key_of(1), 10_000, lambda: content_of(1, 10_000))
    result.put(bytes(got) == content_of(1, 10_000))


def test_a_disk_without_room_costs_the_cache_and_not_the_data(tmp_path):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_on_a_full_disk, args=(tmp_path, result))
    process.start()
    assert result.get(timeout=60)
    process.join(60)
    assert used(tmp_path) == 0 and not list(tmp_path.rglob("*.part"))


def test_half_a_file_is_not_used(tmp_path):
    cache = NodeCache(tmp_path, 10_000)
    cache.get(key_of(1), 1000, lambda: content_of(1))
    path = tmp_path / "blocks" / key_of(1)[:2] / key_of(1)
    path.write_bytes(content_of(1)[:500])
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))[0]) == content_of(1)


def _killed_while_filling(folder, started):
    def fetch():
        part = next(Path(folder).glob("blocks/??/.*.part"))
        part.write_bytes(b"half")
        started.set()
        time.sleep(60)

    NodeCache(folder, 10_000).get(key_of(2), 1000, fetch)


def test_what_a_killed_process_left_behind_is_cleared_away_and_what_lives_is_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_killed_while_filling, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    cache = NodeCache(tmp_path, 10_000)
    cache.get(key_of(1), 1000, lambda: content_of(1))
    assert list(tmp_path.rglob("*.part")), "its writer lives"
    process.kill()
    process.join(60)
    cache.get(key_of(3), 1000, lambda: content_of(3))
    assert not list(tmp_path.rglob("*.part"))
    assert bytes(cache.get(key_of(2), 1000, lambda: content_of(2))[0]) == content_of(2)


def test_files_of_others_are_left_alone(tmp_path):
    theirs = [tmp_path / "db" / "important.txt", tmp_path / "blocks" / "ab" / "notes", tmp_path / "v1" / ".env"]
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        os.utime(path, (1000, 1000))
    (tmp_path / "blocks" / "en" / "folder").mkdir(parents=True)
    cache = NodeCache(tmp_path, 1_500)
    for number in range(4):
        cache.get(key_of(number), 1000, lambda number=number: content_of(number))
    assert all(path.read_text() == "precious" for path in theirs)
    assert cache.counters.evicted == 3


def test_trouble_with_the_folder_costs_the_cache_and_not_the_data(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cache = NodeCache(tmp_path / "file" / "cache")
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))[0]) == content_of(1)
    cache = NodeCache(tmp_path / "cache")
    cache.get(key_of(1), 1000, lambda: content_of(1))
    shutil.rmtree(tmp_path / "cache")  # in the middle of a run
    content, mapped = cache.get(key_of(1), 1000, lambda: content_of(1))
    assert bytes(content) == content_of(1) and mapped

    def no_locks(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    content, mapped = cache.get(key_of(2), 1000, lambda: content_of(2))
    assert bytes(content) == content_of(2) and not mapped


def test_a_stopped_process_holds_up_nobody_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("imaml_dist.data.cache.FILL_WAIT_S", 0.2)
    monkeypatch.setattr("imaml_dist.data.cache.ROOM_WAIT_S", 0.2)
    cache = NodeCache(tmp_path, 10_000)
    cache.get(key_of(0), 1000, lambda: content_of(0))
    with exclusive(tmp_path / "blocks" / "room") as held:
        assert held
        for number in (1, 2, 3):
            content, mapped = cache.get(key_of(number), 1000, lambda number=number: content_of(number))
            assert bytes(content) == content_of(number) and not mapped
    part, _ = cache._locked_part(key_of(5))
    content, mapped = NodeCache(tmp_path, 10_000).get(key_of(5), 1000, lambda: content_of(5))
    assert bytes(content) == content_of(5) and not mapped
    os.close(part)
    assert used(tmp_path) == 1000


def test_what_fetching_raises_is_raised_and_leaves_nothing(tmp_path):
    cache = NodeCache(tmp_path, 10_000)

    def fails():
        raise StorageError("gone")

    with pytest.raises(StorageError, match="gone"):
        cache.get(key_of(1), 1000, fails)
    assert used(tmp_path) == 0
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))[0]) == content_of(1)
