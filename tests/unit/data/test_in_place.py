"""Class records in a folder that others write to: what was changed is looked at again, and damage is never used."""

import os
import threading

import numpy as np
import pytest
from helpers.datasets import records, shard, write_blobs

from imaml_dist.data.dataset import Dataset
from imaml_dist.errors import ChangedError, DataError


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path / "blobs")
    return tmp_path / "blobs"


def rewrite(path, content):
    """In place, as `cp` does."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate(len(content))
    os.utime(path, ns=(1, os.stat(path).st_mtime_ns + 1))


def test_damage_is_found_before_the_first_use_and_named(folder):
    dataset = Dataset(str(folder))
    entry, path = dataset.classes("train")[3], shard(folder, "train")
    content = bytearray(path.read_bytes())
    begin = entry.offset + entry.header
    content[begin + 100] ^= 1
    rewrite(path, bytes(content))
    dataset.images(dataset.classes("train")[2])
    with pytest.raises(DataError, match=rf"{path.name}: bytes {begin} to {begin + 20 * 784}.*'train/c003'"):
        dataset.images(entry)


def test_a_shard_that_is_damaged_after_its_first_use_is_verified_again(folder):
    dataset = Dataset(str(folder))
    entry, path = dataset.classes("train")[3], shard(folder, "train")
    dataset.images(entry)
    content = bytearray(path.read_bytes())
    content[entry.offset + entry.header] ^= 1
    rewrite(path, bytes(content))
    with pytest.raises(DataError, match="do not match the index"):
        dataset.images(entry)


def test_a_shard_that_is_touched_or_copied_again_is_read_on(folder):
    dataset = Dataset(str(folder))
    entry, path = dataset.classes("train")[3], shard(folder, "train")
    before = dataset.images(entry)
    rewrite(path, path.read_bytes())
    np.testing.assert_array_equal(dataset.images(entry), before)


def test_a_shard_cut_after_it_was_opened_is_refused(folder):
    dataset = Dataset(str(folder))
    entry, path = dataset.classes("train")[0], shard(folder, "train")
    dataset.images(entry)
    rewrite(path, path.read_bytes()[:-1024])
    with pytest.raises(DataError, match="missing"):
        dataset.images(entry)


def test_what_was_read_while_somebody_wrote_is_not_used(folder):
    dataset = Dataset(str(folder))
    entry, path = dataset.classes("train")[0], shard(folder, "train")

    class Writer:
        """Writes to the shard in the middle of every reading."""

        left = 1

        def __len__(self):
            return 2

        def __iter__(self):
            if self.left:
                self.left -= 1
                rewrite(path, path.read_bytes())
            return iter([0, 1])

    expected = next(r.images for r in records("train", 1) if r.key == entry.key)
    np.testing.assert_array_equal(dataset.gather([(entry, Writer())])[0], expected[:2])
    always = Writer()
    always.left = 100
    with pytest.raises(ChangedError, match="written to while it was read"):
        dataset.gather([(entry, always)])


def test_copying_over_a_shard_in_use_ends_nothing(folder):
    """`cp` cuts the file to nothing first: a reader that had it mapped would be ended by the system."""
    dataset, path = Dataset(str(folder)), shard(folder, "train")
    content, stop, outcomes = path.read_bytes(), threading.Event(), set()

    def copy():
        while not stop.is_set():
            path.write_bytes(content)

    thread = threading.Thread(target=copy)
    thread.start()
    expected = {r.key: r.images for r in records("train", 12)}
    try:
        for _ in range(300):
            for entry in dataset.classes("train"):
                try:
                    np.testing.assert_array_equal(dataset.images(entry), expected[entry.key])
                    outcomes.add("read")
                except (DataError, ChangedError):
                    outcomes.add("refused")
    finally:
        stop.set()
        thread.join()
    assert "refused" in outcomes
    for entry in dataset.classes("train"):
        np.testing.assert_array_equal(dataset.images(entry), expected[entry.key])


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("imaml_dist.data.in_place.open_files", lambda: 2)
    write_blobs(tmp_path, shard_bytes=1)
    dataset = Dataset(str(tmp_path))
    for record in records("train", 12):
        entry = next(entry for entry in dataset.classes("train") if entry.key == record.key)
        np.testing.assert_array_equal(dataset.images(entry), record.images)
    assert len(dataset._shards._open) == 2
