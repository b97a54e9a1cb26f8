"""Class records through the node's cache: every byte verified, whatever storage, cache and other writers do meanwhile."""

import mmap
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers.datasets import CLASSES, records, shard, write_blobs

from imaml_dist.data.blocks import blocks_of
from imaml_dist.data.cache import NodeCache
from imaml_dist.data.cached import FAILURE_S, FETCHES, CachedShards
from imaml_dist.data.index import read_index
from imaml_dist.errors import DataError, StorageError
from imaml_dist.storage.folder import Folder


@dataclass
class Counting:
    """A folder that counts what is read of it, and lets a test change it."""

    inner: Folder
    url: str = "s3://bucket/blobs"
    read_bytes: int = 0
    reads: int = 0
    spoil: object = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stat(self, name):
        return self.inner.stat(name)

    def read(self, name, begin=0, end=None, *, version=None):
        with self.lock:
            self.reads += 1
            number = self.reads
        content = self.inner.read(name, begin, end, version=version)
        self.read_bytes += len(content)
        return self.spoil(number, content) if self.spoil else content


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path / "blobs", shard_bytes=60_000)
    return tmp_path / "blobs"


@pytest.fixture
def storage(folder):
    return Counting(Folder(folder))


@pytest.fixture
def opened(storage, folder, tmp_path):
    made = []

    def open_(budget=10**9, cache="cache"):
        made.append(CachedShards(storage, read_index(Folder(folder)), NodeCache(tmp_path / cache, budget), 4))
        return made[-1]

    yield open_
    for shards in made:
        shards.close()


def classes_of(folder, split="train"):
    return read_index(Folder(folder)).splits[split]


def check_all(shards, folder):
    for split, count in CLASSES.items():
        written = {r.key: r.images for r in records(split, count)}
        entries = classes_of(folder, split)
        images = shards.gather([(entry, range(entry.shape[0])) for entry in entries])
        for entry, found in zip(entries, images, strict=True):
            np.testing.assert_array_equal(found, written[entry.key])


def test_blocks_cover_every_record_once(folder):
    index = read_index(Folder(folder))
    for size in (1, 20_000, 10**9):
        blocks = blocks_of(index, size)
        keys = sorted(record.key for block in blocks for record in block.records)
        assert keys == sorted(entry.key for classes in index.splits.values() for entry in classes)
        for block in blocks:
            ends = [edge for record in block.records for edge in (record.begin, record.end)]
            assert ends == sorted(ends) and block.end <= index.shards[block.shard].size
            assert block.records[-1].begin - block.begin < size


def test_all_is_read_once_and_then_comes_from_the_cache(opened, storage, folder):
    shards = opened()
    shards.check()
    for _ in range(3):
        check_all(shards, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert storage.read_bytes <= size
    before = storage.reads
    check_all(opened(), folder)  # as another process of the node
    assert storage.reads == before


@pytest.mark.parametrize("budget", [0, 20_000, 100_000])
def test_a_cache_smaller_than_the_data_set_works(opened, folder, tmp_path, budget):
    shards = opened(budget)
    for _ in range(2):
        check_all(shards, folder)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("blocks/??/*")) <= budget


def flipped(content):
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def test_what_arrives_damaged_is_fetched_again(opened, storage, folder):
    storage.spoil = lambda number, content: flipped(content) if number % 3 == 1 else content
    check_all(opened(), folder)


def test_what_always_arrives_damaged_is_named(opened, storage, folder, tmp_path):
    storage.spoil = lambda number, content: flipped(content)
    entry = classes_of(folder)[0]
    with pytest.raises(DataError) as caught:
        opened().fetch([entry])
    block = blocks_of(read_index(Folder(folder)))[0]
    at = block.begin + (block.end - block.begin) // 3
    hit = next(record for record in block.records if record.begin <= at < record.end)
    expected = f"s3://bucket/blobs/{shard(folder, 'train').name}: bytes {hit.begin} to {hit.end}, the images of class {hit.key!r}"
    assert expected in str(caught.value)
    assert storage.reads == FETCHES
    assert not list((tmp_path / "cache").glob("blocks/??/*"))


def test_what_is_damaged_in_the_cache_is_fetched_again(opened, storage, folder, tmp_path):
    check_all(opened(), folder)
    for path in (tmp_path / "cache").glob("blocks/??/*"):
        path.write_bytes(flipped(path.read_bytes()))
    before = storage.reads
    check_all(opened(), folder)
    assert storage.reads == 2 * before


def test_a_replaced_shard_with_the_same_content_is_read_on(opened, storage, folder):
    shards = opened()
    shards.check()
    path = shard(folder, "train")
    path.write_bytes(path.read_bytes())
    check_all(shards, folder)


def test_a_shard_replaced_by_another_is_refused_by_name(opened, storage, folder):
    shards = opened()
    shards.check()
    path = shard(folder, "train")
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path.name}: bytes"):
        check_all(shards, folder)


def test_missing_and_short_shards_are_known_at_once(opened, folder):
    path = shard(folder, "val")
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(DataError, match=rf"{path.name} is {len(content) - 512} bytes.*missing"):
        opened().check()
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        opened().check()


def test_storage_that_fails_is_not_taken_for_damage(opened, storage, folder):
    def fails(number, content):
        raise StorageError("no route")

    storage.spoil = fails
    with pytest.raises(StorageError, match="no route"):
        check_all(opened(), folder)
    assert storage.reads <= 4  # one for each connection, none again


def test_many_threads_read_the_same_bytes(opened, folder):
    shards, trouble = opened(60_000), []

    def reader():
        try:
            for _ in range(5):
                check_all(shards, folder)
        except BaseException as error:  # told to the test's own thread
            trouble.append(error)

    threads = [threading.Thread(target=reader) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble


def test_who_wants_what_is_on_its_way_waits_for_it(opened, storage, folder):
    def slow(number, content):
        time.sleep(0.1)
        return content

    storage.spoil = slow
    shards, entries = opened(0), classes_of(folder)[:1]
    threads = [threading.Thread(target=shards.fetch, args=(entries,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.reads == 1


def test_an_outage_is_waited_for_once(opened, storage, folder):
    """Four connections ask for seven shards: those in the queue do not wait for their own turn to fail."""

    def fails(number, content):
        time.sleep(0.2)
        raise StorageError("no route")

    storage.spoil = fails
    shards = opened()
    everything = [entry for split in CLASSES for entry in classes_of(folder, split)]
    with pytest.raises(StorageError, match="no route"):
        shards.fetch(everything)
    assert storage.reads <= 4
    storage.spoil = None
    while shards._coming:
        time.sleep(0.01)
    shards._failed_at -= FAILURE_S
    check_all(shards, folder)  # storage is back


def test_content_is_mapped_and_not_held_in_memory(opened, folder):
    shards = opened()
    check_all(shards, folder)
    assert all(isinstance(block.content.obj, mmap.mmap) for block in shards._open.values())
    loose = opened(0, "none")
    check_all(loose, folder)
    assert not loose._open


def test_more_blocks_than_files_may_be_open(opened, folder, monkeypatch):
    monkeypatch.setattr("imaml_dist.data.cached.open_files", lambda: 2)
    shards = opened()
    check_all(shards, folder)
    assert len(shards._open) == 2


def test_damage_in_a_cache_that_cannot_be_mended_is_passed_by(opened, folder, tmp_path, monkeypatch):
    check_all(opened(), folder)
    for path in (tmp_path / "cache").glob("blocks/??/*"):
        path.write_bytes(flipped(path.read_bytes()))
    monkeypatch.setattr(NodeCache, "discard", lambda self, key: False)
    check_all(opened(), folder)
