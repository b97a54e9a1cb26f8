"""Shards of a user's own: written with plain webdataset they become a data set where they are, and nothing in them is executed."""

import io
import pickle
import re
import tarfile

import numpy as np
import pytest
import webdataset
from helpers.datasets import write_blobs

from imaml_dist.data.dataset import CacheOptions, Dataset
from imaml_dist.data.index import read_index
from imaml_dist.data.prepare.own_shards import index_shards
from imaml_dist.data.verify import mismatches
from imaml_dist.errors import DataError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage

IMAGES = {
    f"{split}-{shard:06d}.tar": {
        f"{prefix}{shard}{n}": np.random.default_rng([shard, n]).integers(0, 256, (2 + n, 6, 5, 3), np.uint8)
        for n in range(3)
    }
    for split, prefix, shard in [("train", "dogs/", 0), ("train", "a-B_", 1), ("test", "z", 0)]
}


def npy(array, **kwargs) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()


def write(folder, shards=IMAGES):
    folder.mkdir(exist_ok=True)
    for shard, classes in shards.items():
        with webdataset.TarWriter(str(folder / shard)) as writer:
            for key, images in classes.items():
                description = {} if key.endswith("1") else {"json": {"name": key}}
                writer.write({"__key__": key, "images.npy": images, **description})
    return Folder(folder)


def check(dataset):
    for split in ("train", "test"):
        expected = {k: v for shard, classes in IMAGES.items() if shard.startswith(split) for k, v in classes.items()}
        assert [c.key for c in dataset.classes(split)] == sorted(expected)
        for entry in dataset.classes(split):
            np.testing.assert_array_equal(dataset.images(entry), expected[entry.key])


def archive(folder, *members, shard="train-000000.tar") -> Folder:
    """A shard of any members, (name, content)."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / shard, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Folder(folder)


def refused(storage, what):
    before = {name: storage.read(name) for name, _ in storage.names()}
    with pytest.raises(DataError, match=what) as caught:
        index_shards(storage, "mine")
    assert "\n" not in str(caught.value)
    assert {name: storage.read(name) for name, _ in storage.names()} == before


GOOD = ("good.images.npy", npy(np.zeros((2, 4, 4, 1), np.uint8)))


def test_shards_written_with_plain_webdataset_are_read_as_a_data_set(tmp_path):
    storage = write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = []
    index, there = index_shards(storage, "mine", lambda *args: told.append(args))
    assert not there and index.name == "mine" and told[-1] == (3, 3)
    check(Dataset(str(tmp_path)))
    assert list(mismatches(storage, index)) == []
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() - before.keys() == {"index.json"} and before.items() <= after.items()


def test_a_second_time_changes_nothing_and_says_so(tmp_path):
    storage = write(tmp_path)
    first, _ = index_shards(storage, "mine")
    version = storage.stat("index.json").version
    assert index_shards(storage, "mine") == (first, True)
    assert storage.stat("index.json").version == version


def test_shards_that_come_or_change_later_are_taken_in(tmp_path):
    storage = write(tmp_path)
    index_shards(storage, "mine")
    write(tmp_path, {"val-000000.tar": IMAGES["train-000000.tar"], "test-000000.tar": IMAGES["train-000001.tar"]})
    index, there = index_shards(storage, "mine")
    assert not there and list(map(len, index.splits.values())) == [6, 3, 3]
    assert list(mismatches(storage, index)) == []
    storage.write(
        "index.json",
        storage.read("index.json").replace(b'"shards"', b'"shards" ', 1).replace(index.fingerprint.encode(), b"x"),
    )
    assert index_shards(storage, "mine") == (index, False), "a damaged one that says what it is of"
    for foreign in (
        b"damaged",
        b'{"pages": []}',
        b'{"format": "imaml-class-records", "provenance": {"kind": "folder"}}',
    ):
        storage.write("index.json", foreign)
        refused(storage, r"already holds an index\.json which cannot be read and does not say that it is of this kind")
        assert storage.read("index.json") == foreign


def test_shards_in_object_storage_are_indexed_there(tmp_path, moto_bucket):
    url, options = moto_bucket
    storage = write(tmp_path / "here")
    bucket = open_storage(f"{url}/mine", options)
    for name, _ in storage.names():
        bucket.write(name, tmp_path / "here" / name)
    index, _ = index_shards(storage, "mine")
    assert index_shards(bucket, "mine") == (index, False)
    assert index_shards(bucket, "mine") == (index, True)
    dataset = Dataset(f"{url}/mine", options, CacheOptions(tmp_path / "cache"))
    check(dataset)
    dataset.close()


def test_a_place_without_shards_is_refused(tmp_path):
    (tmp_path / "shard-0.tar").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "train-000000.tar").touch()
    refused(Folder(tmp_path), r"holds no shard named as train-000000\.tar")
    refused(Folder(tmp_path / "nowhere"), "holds no shard")


def test_a_data_set_that_was_prepared_is_left_alone(tmp_path):
    index = write_blobs(tmp_path)
    refused(Folder(tmp_path), "already holds the data set 'blobs'")
    assert read_index(Folder(tmp_path)) == index


@pytest.mark.parametrize(
    "field",
    ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "images.npy.gz", "json.gz", "txt", "png", "images.pyd", ""],
)
def test_members_that_plain_readers_would_execute_or_nobody_would_read_are_refused(tmp_path, field):
    storage = archive(tmp_path, GOOD, (f"a.{field}", b"x"))
    refused(storage, rf"shard .*/train-000000\.tar, byte 1024: the member 'a\.{re.escape(field)}' is neither")


@pytest.mark.parametrize("key", ["a b", "ü", "", "a/", ".a", "a+b"])
def test_keys_of_other_characters_are_refused(tmp_path, key):
    refused(
        archive(tmp_path, GOOD, (f"{key}.images.npy", GOOD[1])), "byte 1024: the (member|name)|byte 2048: the member"
    )


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_ever_unpickled(tmp_path):
    canary = tmp_path / "canary"
    bad = np.empty(1, object)
    bad[0] = Canary(canary)
    header = npy(np.zeros((2, 4, 4, 1), np.uint8))[:128]
    for content in (
        npy(bad, allow_pickle=True),
        pickle.dumps(Canary(canary)),
        header + pickle.dumps(Canary(canary)),
        header.replace(b"'|u1'", b"'|O' "),
        b"\x93NUMPY\x01\x00v\x00" + f"open({str(canary)!r}, 'w')".encode().ljust(117) + b"\n",
    ):
        refused(archive(tmp_path / "x", ("a.images.npy", content)), r"byte \d+: 'a\.images\.npy' (is|has)")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists(), "the canary sings"


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), "is an array of float32"),
        (np.zeros((2, 4, 4, 1), np.int8), "is an array of int8"),
        (np.zeros((2, 4, 4, 1), bool), "is an array of bool"),
        (np.zeros((2, 4, 4, 1), "u1,u1"), "is an array of"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "in C order"),
        (np.zeros((2, 4, 4), np.uint8), r"\(2, 4, 4\), images are uint8 \[n, H, W, C\]"),
        (np.zeros((), np.uint8), r"\(\), images are"),
        (np.zeros((2, 4, 4, 1, 1), np.uint8), "images are uint8"),
        (np.zeros((0, 4, 4, 1), np.uint8), "images are uint8"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, says):
    refused(archive(tmp_path, GOOD, ("a.images.npy", npy(array))), rf"byte 1536: 'a\.images\.npy' .*{says}")


@pytest.mark.parametrize(
    "shape",
    ["(2, 4, 4, 2)", "(99999999999999999999, 4, 4, 1)", "(-2, -4, 4, 1)", "(2, 4, 4, 1.0)", "2"],
)
def test_headers_that_do_not_fit_their_content_are_refused(tmp_path, shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    refused(
        archive(tmp_path, ("a.images.npy", b"\x93NUMPY\x01\x00v\x00" + text + bytes(32))), r"byte 512: 'a\.images\.npy'"
    )


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c + b"x", lambda c: c[:60], lambda c: b"", lambda c: b"text"]
)
def test_arrays_of_another_size_are_refused(tmp_path, change):
    refused(archive(tmp_path, ("a.images.npy", change(GOOD[1]))), r"byte 512: 'a\.images\.npy'")


def test_the_second_version_of_npy_is_read_and_others_are_refused(tmp_path):
    def saved(version):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.zeros((2, 4, 4, 1), np.uint8), version)
        return ("a.images.npy", buffer.getvalue())

    index_shards(archive(tmp_path / "second", saved((2, 0))), "mine")
    assert Dataset(str(tmp_path / "second")).classes("train")[0].shape == (2, 4, 4, 1)
    refused(archive(tmp_path / "third", saved((3, 0))), "is not an npy file")


def test_what_is_there_twice_or_half_is_refused(tmp_path):
    refused(archive(tmp_path / "a", GOOD, GOOD), r"byte 1024: a second 'good\.images\.npy'")
    refused(archive(tmp_path / "b", GOOD, ("good.json", b""), ("good.json", b"")), r"a second 'good\.json'")
    refused(archive(tmp_path / "c", GOOD, ("bad.json", b"{}")), r"class 'bad' has a description and no images\.npy")
    refused(archive(tmp_path / "d"), "holds no class")
    archive(tmp_path / "e", GOOD)
    refused(
        archive(tmp_path / "e", GOOD, shard="train-000001.tar"),
        r"class 'good' is in train-000000\.tar and again in train-000001\.tar",
    )
    archive(tmp_path / "f", GOOD)
    index_shards(archive(tmp_path / "f", GOOD, shard="test-000000.tar"), "mine")  # splits have classes of their own


def test_classes_of_several_sizes_are_refused(tmp_path):
    refused(
        archive(tmp_path, GOOD, ("a.images.npy", npy(np.zeros((2, 4, 5, 1), np.uint8)))), r"has images of \(4, 4, 1\)"
    )


def test_a_huge_description_is_refused(tmp_path):
    refused(archive(tmp_path, GOOD, ("good.json", bytes((16 << 20) + 1))), "a description of 16777217 bytes")


def test_damage_is_refused_with_its_byte(tmp_path):
    storage = archive(tmp_path, GOOD, ("good.json", b"{}"))
    whole = storage.read("train-000000.tar")
    storage.write("train-000000.tar", whole[:1500])
    refused(storage, r"shard .*/train-000000\.tar, byte 1024: ")
    storage.write("train-000000.tar", whole[:1030] + b"x" + whole[1031:])
    refused(storage, r"byte 1024: a header that does not match its own checksum")
