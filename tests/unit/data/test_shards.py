"""Shards and index: reproducible, readable by plain webdataset, and nothing damaged is ever used."""

import json

import numpy as np
import pytest
import webdataset
from helpers.datasets import CLASSES, records, write_blobs

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.index import Index
from imaml_dist.data.records import ClassRecord
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import DataError


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path / "blobs", shard_bytes=60_000)
    return tmp_path / "blobs"


def test_images_come_back_as_written_and_classes_in_bytewise_order(folder):
    dataset = Dataset(str(folder))
    for split, count in CLASSES.items():
        written = {r.key: r.images for r in records(split, count)}
        classes = dataset.classes(split)
        assert [c.key.encode() for c in classes] == sorted(k.encode() for k in written)
        for entry in classes:
            np.testing.assert_array_equal(dataset.images(entry), written[entry.key])
    assert len(dataset.index.shards) > 3
    assert dataset.index.image_shape == (1, 28, 28)


def test_writing_twice_gives_the_same_bytes_in_any_order_of_records(tmp_path, folder):
    again = tmp_path / "again"
    splits = {split: records(split, count)[::-1] for split, count in CLASSES.items()}
    write_dataset(again, "blobs", splits, {"made": "for tests"}, shard_bytes=60_000)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in again.iterdir())


def test_plain_webdataset_reads_the_shards(folder):
    index = Index.from_json((folder / "index.json").read_bytes(), "index")
    shards = [str(folder / s.name) for s in index.shards if s.name.startswith("val-")]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    expected = {r.key: r for r in records("val", CLASSES["val"])}
    assert {s["__key__"] for s in samples} == set(expected)
    for sample in samples:
        array = np.lib.format.read_array(__import__("io").BytesIO(sample["images.npy"]), allow_pickle=False)
        np.testing.assert_array_equal(array, expected[sample["__key__"]].images)
        assert json.loads(sample["json"])["name"] == expected[sample["__key__"]].name


def test_rotations_are_classes_of_their_own_over_the_same_bytes(tmp_path):
    write_dataset(tmp_path, "r", {"train": records("train", 2)}, {}, rotations={"train": 4})
    dataset = Dataset(str(tmp_path))
    by_key = {c.key: c for c in dataset.classes("train")}
    assert len(by_key) == 8
    upright = dataset.images(by_key["train/c000"])
    for turns in (1, 2, 3):
        turned = dataset.images(by_key[f"train/c000@rot{90 * turns:03d}"])
        np.testing.assert_array_equal(turned, np.rot90(upright, turns, axes=(1, 2)))


def _damage(folder, change):
    path = next(p for p in sorted(folder.iterdir()) if p.name.startswith("train-"))
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


@pytest.mark.parametrize("cut", [1, 512, 1024, 10_000])
def test_a_truncated_shard_is_refused_by_name_with_the_missing_range(folder, cut):
    path = _damage(folder, lambda data: data[:-cut])
    with pytest.raises(DataError, match=f"{path.name} is {path.stat().st_size} bytes long.*missing"):
        Dataset(str(folder))


def test_every_flipped_bit_is_noticed(folder):
    generator = np.random.default_rng(0)
    path = next(p for p in sorted(folder.iterdir()) if p.name.startswith("val-"))
    whole = path.read_bytes()
    for position in generator.integers(0, len(whole), 50):
        data = bytearray(whole)
        data[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{path.name} has sha256"):
            Dataset(str(folder))


def test_missing_pieces_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        Dataset(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no index\.json"):
        Dataset(str(tmp_path / "empty"))
    path = next(p for p in folder.iterdir() if p.name.startswith("test-"))
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        Dataset(str(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["splits"]["train"][0].update(offset=0), "fingerprint"),
        (lambda raw: raw["shards"][0].update(name="../../etc/passwd"), "not a plain file name"),
        (lambda raw: raw["shards"][0].update(name=""), "not a plain file name"),
        (lambda raw: raw["splits"]["train"][0].update(shape=[2**70, 0, 28, 1]), "impossible place or shape"),
        (lambda raw: raw["splits"]["train"][0].update(shape=[2, 14, 28, 1]), "has images of"),
        (lambda raw: raw["splits"]["train"][0].update(rot=7), "turned 7 times"),
        (lambda raw: raw["splits"]["train"].reverse(), "bytewise order"),
        (lambda raw: raw.update(version=2), "version 2 is not"),
        (lambda raw: raw.pop("shards"), "not a readable index"),
        (lambda raw: raw["splits"]["train"][0].update(offset=10**9), "behind the end of its shard"),
        (lambda raw: raw["splits"]["train"][0].update(shape=[1, 2]), "not a readable index"),
    ],
)
def test_a_changed_index_is_refused(folder, change, says):
    path = folder / "index.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=says):
        Dataset(str(folder))


def test_records_that_cannot_be_read_back_are_refused(tmp_path):
    images = np.zeros((2, 28, 28, 1), np.uint8)
    for key in ("with space", "dot.ted", "", "a\nb"):
        with pytest.raises(ValueError, match="class key"):
            write_dataset(tmp_path, "x", {"train": [ClassRecord(key, images)]}, {})
    with pytest.raises(ValueError, match="must be uint8"):
        write_dataset(tmp_path, "x", {"train": [ClassRecord("a", images.astype(np.float32))]}, {})
    assert not (tmp_path / "index.json").exists()
