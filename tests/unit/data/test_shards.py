"""Shards and index: reproducible, readable by plain webdataset, and nothing damaged is ever used."""

import contextlib
import hashlib
import io
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from helpers.datasets import CLASSES, Breaking, records, shard, write_blobs

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.index import Index, pixel_ranges, read_index
from imaml_dist.data.records import ClassRecord, LazyRecord
from imaml_dist.data.shards import write_dataset
from imaml_dist.data.verify import mismatches
from imaml_dist.errors import DataError, StorageError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage


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
        array = np.lib.format.read_array(io.BytesIO(sample["images.npy"]), allow_pickle=False)
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


def test_a_flipped_bit_of_images_is_refused_before_use_and_one_anywhere_is_found_by_verifying(folder):
    generator = np.random.default_rng(0)
    index = read_index(Folder(folder))
    number, shard = next((n, s) for n, s in enumerate(index.shards) if s.name.startswith("val-"))
    ranges = pixel_ranges(index)[number]
    whole = (folder / shard.name).read_bytes()
    edges = [place for pair in ranges for place in (pair[0] - 1, pair[0], pair[1] - 1, pair[1])]
    for position in [0, len(whole) - 1, *edges, *generator.integers(0, len(whole), 30)]:
        data = bytearray(whole)
        data[position] ^= 1 << int(generator.integers(8))
        (folder / shard.name).write_bytes(data)
        (found,) = mismatches(Folder(folder), index)
        assert found.shard == shard.name and found.begin <= position < found.end
        hit = [f"bytes {begin} to {end}, the images" for begin, end in ranges if begin <= position < end]
        with pytest.raises(DataError, match=f"{shard.name}: {hit[0]}") if hit else contextlib.nullcontext():
            dataset = Dataset(str(folder))
            for entry in dataset.classes("val"):
                dataset.images(entry)


def test_missing_pieces_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere has no index\.json"):
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
        (lambda raw: raw["shards"][0].update(name="pipe:touch executed"), "not a plain file name"),
        (lambda raw: raw["splits"]["train"][0].update(shape=[2**70, 0, 28, 1]), "impossible place or shape"),
        (lambda raw: raw["splits"]["train"][0].update(shape=[2, 14, 28, 1]), "has images of"),
        (lambda raw: raw["splits"]["train"][0].update(rot=7), "turned 7 times"),
        (lambda raw: raw["splits"]["train"].reverse(), "bytewise order"),
        (lambda raw: raw.update(version=1), "version 1 is not"),
        (lambda raw: raw["shards"][0]["gaps"].pop(), "4 classes and 4 gaps"),
        (lambda raw: raw["shards"][0].update(gaps=["x"]), "not a readable index"),
        (lambda raw: raw["shards"][0]["gaps"].__setitem__(1, -1), "no CRC32 numbers"),
        (lambda raw: raw["shards"][1].update(name=raw["shards"][0]["name"]), "listed twice"),
        (lambda raw: raw["splits"]["train"][1].update(offset=raw["splits"]["train"][0]["offset"] + 9), "overlap"),
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


def test_a_pipe_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("pipe:touch executed", "pipe:touch executed; cat"):
        with pytest.raises(DataError, match=r"has no index\.json"):
            Dataset(url)
    assert not (tmp_path / "executed").exists()


def test_records_that_cannot_be_read_back_are_refused(tmp_path):
    images = np.zeros((2, 28, 28, 1), np.uint8)
    for key in ("with space", "dot.ted", "", "a\nb"):
        with pytest.raises(ValueError, match="class key"):
            write_dataset(tmp_path, "x", {"train": [ClassRecord(key, images)]}, {})
    with pytest.raises(ValueError, match="class key 'a' is in split 'train' twice"):
        write_dataset(tmp_path, "x", {"train": [ClassRecord("a", images)] * 2}, {})
    with pytest.raises(ValueError, match="must be uint8"):
        write_dataset(tmp_path, "x", {"train": [ClassRecord("a", images.astype(np.float32))]}, {})
    assert not (tmp_path / "index.json").exists()


def test_an_index_too_large_to_be_one_is_refused_unread(tmp_path):
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(DataError, match=f"is {(32 << 20) + 1} bytes long, an index has at most {32 << 20}"):
        Dataset(str(tmp_path))


def _lazy(loaded, split, count):
    """Records that note when they are loaded."""

    def lazy(record):
        return LazyRecord(record.key, record.shape, lambda: loaded.append(record.key) or record)

    return [lazy(record) for record in records(split, count, images=2)]


def _prepare(place, loaded, provenance="same", classes=6):
    splits = {"train": _lazy(loaded, "train", classes), "test": _lazy(loaded, "test", 3)}
    return write_dataset(place, "x", splits, {"made": provenance}, shard_bytes=3000)


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_preparation_goes_on_where_it_stopped(tmp_path):
    _prepare(tmp_path / "undisturbed", expected := [])
    index = read_index(Folder(tmp_path / "undisturbed"))
    shards = [[c.key for c in sum(index.splits.values(), ()) if c.shard == n] for n in range(len(index.shards))]
    assert list(map(len, shards)) == [2, 2, 2, 2, 1]
    writes = 2 * len(shards) + 1  # a shard and a note each, and the index
    for k in range(1, writes + 1):
        folder = tmp_path / str(k)
        with pytest.raises(StorageError, match="the disk is gone"):
            _prepare(Breaking(folder, k), [])
        assert not (folder / "index.json").exists()
        _prepare(folder, loaded := [])
        assert len(loaded) == len(expected) - sum(map(len, shards[: (k - 1) // 2]))
        assert _content(folder) == _content(tmp_path / "undisturbed"), k


def test_an_interrupted_preparation_of_something_else_is_not_gone_on_with(tmp_path):
    _prepare(tmp_path / "undisturbed", expected := [])
    with pytest.raises(StorageError):
        _prepare(Breaking(tmp_path / "x", 8), [], "other")
    _prepare(tmp_path / "x", loaded := [])
    assert loaded == expected
    assert _content(tmp_path / "x") == _content(tmp_path / "undisturbed")


def test_a_shard_that_was_changed_since_the_interruption_is_written_again(tmp_path):
    _prepare(tmp_path / "undisturbed", [])
    with pytest.raises(StorageError):
        _prepare(Breaking(tmp_path / "x", 8), [])
    shard(tmp_path / "x", "train").write_bytes(b"of somebody else")
    _prepare(tmp_path / "x", [])
    assert _content(tmp_path / "x") == _content(tmp_path / "undisturbed")


def test_a_data_set_stays_whole_until_another_one_in_its_place_is(tmp_path):
    """Whatever ends the second preparation, and whenever."""
    _prepare(tmp_path / "new", [], "new")
    for k in range(1, 12):
        folder = tmp_path / str(k)
        _prepare(folder, [], "old", classes=3)
        before = _content(folder)
        with pytest.raises(StorageError):
            _prepare(Breaking(folder, k), [], "new")
        assert before.items() <= _content(folder).items()
        assert not list(mismatches(Folder(folder), read_index(Folder(folder))))
        _prepare(folder, [], "new")
        assert _content(folder) == _content(tmp_path / "new")


def test_shards_of_a_users_own_are_left_alone(tmp_path):
    (tmp_path / "train-000000.tar").write_text("precious")
    _prepare(tmp_path, [])
    assert (tmp_path / "train-000000.tar").read_text() == "precious"


def test_shards_and_notes_of_earlier_preparations_are_removed_and_other_files_left(tmp_path):
    with pytest.raises(StorageError):
        _prepare(Breaking(tmp_path / "x", 17), [], classes=20)
    (tmp_path / "x" / "train-notes.txt").write_text("mine")
    _prepare(tmp_path / "x", [])
    _prepare(tmp_path / "undisturbed", [])
    assert _content(tmp_path / "x") == _content(tmp_path / "undisturbed") | {"train-notes.txt": b"mine"}


def test_another_preparation_that_publishes_meanwhile_is_not_overwritten(tmp_path):
    record = records("train", 1)[0]

    def meanwhile():
        (tmp_path / "index.json").write_text("of another")
        return record

    with pytest.raises(DataError, match=r"another preparation has written its index\.json here meanwhile"):
        write_dataset(tmp_path, "x", {"train": [LazyRecord(record.key, record.shape, meanwhile)]}, {})
    assert (tmp_path / "index.json").read_text() == "of another"


def test_no_more_than_two_records_are_held_at_once(tmp_path):
    live, peak = set(), 0

    def load(number):
        nonlocal peak
        record = ClassRecord(f"c{number:02d}", np.zeros((2, 4, 4, 1), np.uint8))
        live.add(number)
        weakref.finalize(record, live.discard, number)
        peak = max(peak, len(live))
        return record

    lazy = [LazyRecord(f"c{n:02d}", (2, 4, 4, 1), lambda n=n: load(n)) for n in range(20)]
    write_dataset(tmp_path, "x", {"train": lazy}, {})
    assert len(Dataset(str(tmp_path)).classes("train")) == 20
    assert peak <= 2


def test_skipped_images_are_listed_even_if_their_names_are_no_text(tmp_path):
    record = ClassRecord("a", np.zeros((2, 4, 4, 1), np.uint8), skipped=("\udcff.png is damaged",))
    write_dataset(tmp_path, "x", {"train": [record]}, {})
    assert (tmp_path / "skipped.txt").read_text() == "\\udcff.png is damaged\n"
    write_dataset(tmp_path, "x", {"train": records("train", 1)}, {})
    assert not (tmp_path / "skipped.txt").exists()


def test_a_shard_that_somebody_replaced_is_not_published(tmp_path):
    first, second = records("train", 2)
    replaced = []

    def meanwhile():
        replaced.append(shard(tmp_path, "train").name)
        Folder(tmp_path).write(replaced[0], b"of another")
        return second

    lazy = [LazyRecord(first.key, first.shape, first.load), LazyRecord(second.key, second.shape, meanwhile)]
    with pytest.raises(DataError) as caught:
        write_dataset(tmp_path, "x", {"train": lazy}, {}, shard_bytes=1)
    assert f"another preparation has written its {replaced[0]} here meanwhile" in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_what_did_not_change_is_not_made_again(tmp_path):
    """A source that is mended after an interruption: other facts, but the same settings."""

    def prepare(place, loaded, facts, digests="aaa", may_skip=False, skipped=()):
        lazy = [
            LazyRecord(
                r.key, r.shape, lambda r=r: loaded.append(r.key) or replace(r, skipped=skipped), digest, may_skip
            )
            for r, digest in zip(records("train", 3), digests, strict=True)
        ]
        return write_dataset(place, "x", {"train": lazy}, facts, settings={"size": 28}, shard_bytes=1)

    with pytest.raises(StorageError):
        prepare(Breaking(tmp_path / "x", 5), [], {"source": 1}, may_skip=True)
    index = prepare(tmp_path / "x", loaded := [], {"source": 2}, digests="aba")
    assert loaded == ["train/c001", "train/c002"] and index.provenance == {"source": 2}
    with pytest.raises(StorageError):
        prepare(Breaking(tmp_path / "y", 5), [], {}, may_skip=True, skipped=("0.png is damaged",))
    index = prepare(tmp_path / "y", loaded := [], {}, may_skip=False)
    assert len(loaded) == 3 and index.provenance == {}, (
        "where nothing may be left out, what had something is made again"
    )


def test_images_that_were_left_out_are_counted_in_the_provenance(tmp_path):
    splits = {"train": [replace(r, skipped=(f"{r.key} is damaged",)) for r in records("train", 2)]}
    index = write_dataset(tmp_path, "x", splits, {"made": "here"})
    content = (tmp_path / "skipped.txt").read_bytes()
    assert content == b"train/c000 is damaged\ntrain/c001 is damaged\n"
    digest = hashlib.sha256(content).hexdigest()
    assert read_index(Folder(tmp_path)).provenance == {"made": "here", "skipped": {"images": 2, "sha256": digest}}
    assert (
        index.fingerprint != write_dataset(tmp_path, "x", {"train": records("train", 2)}, {"made": "here"}).fingerprint
    )


def test_what_no_reader_would_accept_is_not_published(tmp_path):
    odd = ClassRecord("odd", np.zeros((2, 3, 3, 1), np.uint8))
    with pytest.raises(DataError, match=r"has images of \(28, 28, 1\) turned 0 times, others \(3, 3, 1\)"):
        write_dataset(tmp_path, "x", {"train": [*records("train", 1), odd]}, {})
    with pytest.raises(ValueError, match="'train/c000' is in split 'train' twice"):
        write_dataset(tmp_path, "x", {"train": records("train", 1) * 2}, {})
    assert not (tmp_path / "index.json").exists()


def test_object_storage_is_prepared_continued_and_replaced_as_a_folder_is(tmp_path, moto_bucket, monkeypatch):
    url, options = moto_bucket
    bucket = open_storage(f"{url}/x", options)
    _prepare(tmp_path, expected := [])
    write, left = bucket.write, iter(range(4))  # two shards and their notes

    def breaking(*args, **kwargs):
        if next(left, None) is None:
            raise StorageError("the bucket is gone")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "write", breaking)
        with pytest.raises(StorageError, match="the bucket is gone"):
            _prepare(bucket, [])
    _prepare(bucket, loaded := [])
    assert loaded == expected[4:]
    assert {name: bucket.read(name) for name, _ in bucket.names()} == _content(tmp_path)
    _prepare(bucket, loaded := [], "other", classes=2)
    assert loaded == expected[:2] + expected[-3:] and list(mismatches(bucket, read_index(bucket))) == []
    assert len([name for name, _ in bucket.names() if name.startswith("train")]) == 1
