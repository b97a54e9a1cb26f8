"""The node's cache: one fetch for all processes, never more than the budget, and nothing half-written is ever used."""

import hashlib
import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from imaml_dist.data.cache import NodeCache
from imaml_dist.errors import StorageError


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def content_of(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def never() -> bytes:
    raise AssertionError("fetched again")


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_what_is_there_is_not_fetched_again(tmp_path):
    cache = NodeCache(tmp_path, 10_000)
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))) == content_of(1)
    assert bytes(NodeCache(tmp_path, 10_000).get(key_of(1), 1000, never)) == content_of(1)
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
    assert bytes(cache.get(key_of(7), 100_000, fetch)) == content_of(7, 100_000)


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
    held = cache.get(key_of(0), 1000, lambda: content_of(0))
    for number in range(1, 5):
        cache.get(key_of(number), 1000, lambda number=number: content_of(number))
    for age, number in enumerate([3, 0, 4, 2, 1]):  # 3 is the oldest, then 0
        os.utime(tmp_path / key_of(number)[:2] / key_of(number), (1000 + age, 1000 + age))
    cache.get(key_of(5), 2000, lambda: content_of(5, 2000))
    assert used(tmp_path) <= 5_000
    assert [number for number in range(6) if cache.has(key_of(number))] == [1, 2, 4, 5]
    assert bytes(held) == content_of(0)  # evicted, and still readable for who has it
    assert cache.counters.evicted == 2


def test_what_is_larger_than_the_budget_is_handed_out_and_not_kept(tmp_path, caplog):
    cache = NodeCache(tmp_path, 500)
    for _ in range(2):
        assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))) == content_of(1)
    assert used(tmp_path) == 0 and cache.counters.misses == 2
    assert len([r for r in caplog.records if "budget is 500 bytes" in r.getMessage()]) == 1


def _on_a_full_disk(folder, result):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    got = NodeCache(folder, 10**6).get(key_of(1), 10_000, lambda: content_of(1, 10_000))
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
    path = tmp_path / key_of(1)[:2] / key_of(1)
    path.write_bytes(content_of(1)[:500])
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))) == content_of(1)


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path):
    cache = NodeCache(tmp_path, 10_000)
    old, young = (tmp_path / "ab" / name for name in (".old.1.part", ".young.2.part"))
    old.parent.mkdir()
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    cache.get(key_of(1), 1000, lambda: content_of(1))
    assert young.exists() and not old.exists()


def test_what_fetching_raises_is_raised_and_leaves_nothing(tmp_path):
    cache = NodeCache(tmp_path, 10_000)

    def fails():
        raise StorageError("gone")

    with pytest.raises(StorageError, match="gone"):
        cache.get(key_of(1), 1000, fails)
    assert used(tmp_path) == 0
    assert bytes(cache.get(key_of(1), 1000, lambda: content_of(1))) == content_of(1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"storage\.cache: .*file"):
        NodeCache(tmp_path / "file" / "cache")
