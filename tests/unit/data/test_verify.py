"""Verification names every damaged byte, whatever it belongs to and wherever the data set lies."""

import pytest
from helpers.command import imaml_here
from helpers.datasets import shard_name, write_blobs

from imaml_dist.data.index import read_index
from imaml_dist.data.verify import mismatches
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage

SHARD, TRAIN = shard_name("val"), shard_name("train")


@pytest.fixture
def folder(tmp_path):
    write_blobs(tmp_path / "blobs")
    return Folder(tmp_path / "blobs")


def found(storage):
    return list(mismatches(storage, read_index(storage)))


def flip(storage, *places, shard=SHARD):
    content = bytearray(storage.read(shard))
    for place in places:
        content[place] ^= 0x10
    storage.write(shard, bytes(content))


def places(storage):
    """One byte of every kind in a shard of eight classes, and the member that it is to be named as."""
    classes = read_index(storage).splits["val"]
    size = storage.stat(SHARD).size
    (first, second), last = classes[:2], classes[-1]
    between = f"description of class {first.key!r} and headers of class {second.key!r}"
    return {
        "tar header of the first images": (100, f"headers of class {first.key!r}"),
        "npy header of the first images": (first.offset + 20, f"headers of class {first.key!r}"),
        "first pixel": (first.pixels[0], f"images of class {first.key!r}"),
        "last pixel": (first.pixels[1] - 1, f"images of class {first.key!r}"),
        "padding": (first.pixels[1], between),
        "tar header of a description": (-(-first.pixels[1] // 512) * 512 + 3, between),
        "description": (-(-first.pixels[1] // 512) * 512 + 512, between),
        "tar header of images": (second.offset - 512, between),
        "npy header": (second.offset, between),
        "pixel": (second.pixels[0] + 77, f"images of class {second.key!r}"),
        "end of the archive": (size - 1, f"description of class {last.key!r} and end of the archive"),
    }


def test_what_was_written_verifies(folder):
    told = []
    assert list(mismatches(folder, read_index(folder), lambda *args: told.append(args))) == []
    total = sum(shard.size for shard in read_index(folder).shards)
    assert told[-1] == (total, total)


def test_one_flipped_bit_anywhere_is_named(folder):
    for kind, (place, member) in places(folder).items():
        flip(folder, place)
        (mismatch,) = found(folder)
        assert (mismatch.shard, mismatch.member) == (SHARD, member), kind
        assert mismatch.begin <= place < mismatch.end, kind
        flip(folder, place)


def test_several_flipped_bits_are_all_named_in_their_order(folder):
    chosen = sorted(places(folder).values())
    flip(folder, *(place for place, _ in chosen))
    flip(folder, 1, shard=TRAIN)
    named = found(folder)
    assert [m.member for m in named][1:] == list(dict.fromkeys(member for _, member in chosen))
    assert [m.shard for m in named] == [TRAIN] + [SHARD] * (len(named) - 1)
    assert all(any(m.begin <= place < m.end for m in named) for place, _ in chosen)


def test_short_long_empty_and_missing_shards_are_named(folder):
    content, size = folder.read(SHARD), folder.stat(SHARD).size
    for cut in (1, 5000, size):
        folder.write(SHARD, content[: size - cut])
        (mismatch,) = found(folder)
        assert str(mismatch) == f"shard {SHARD}, bytes {size - cut} to {size}: missing, the shard is too short"
    folder.write(SHARD, content + b"xyz")
    (mismatch,) = found(folder)
    assert str(mismatch) == f"shard {SHARD}, bytes {size} to {size + 3}: not ours, the shard is too long"
    folder.remove(SHARD)
    (mismatch,) = found(folder)
    assert str(mismatch) == f"shard {SHARD}, bytes 0 to {size}: the shard is missing"


def test_damage_in_a_short_shard_is_named_too(folder):
    flip(folder, 100)
    folder.write(SHARD, folder.read(SHARD)[:-2000])
    assert [m.begin for m in found(folder)][1:] == [0]


def test_object_storage_is_verified_as_a_folder_is(folder, moto_bucket):
    url, options = moto_bucket
    bucket = open_storage(f"{url}/blobs", options)
    for name, _ in folder.names():
        bucket.write(name, folder.read(name))
    assert found(bucket) == []
    chosen = [place for place, _ in places(folder).values()]
    for storage in (folder, bucket):
        flip(storage, *chosen)
        storage.remove(TRAIN)
    assert found(bucket) == found(folder)
    assert len(found(bucket)) > 4


def verify(*args, cwd):
    """Exit code and what the command prints, but its progress."""
    code, output = imaml_here("verify", *args, cwd=cwd)
    return code, [line for line in output.splitlines() if not line.startswith("checking shards")]


def test_the_command_prints_all_that_does_not_match(folder, moto_bucket):
    code, lines = verify(folder.url, cwd=folder.path)
    assert (code, lines) == (0, [f"{folder.url}: 3 shards with 28 classes verify"])
    flip(folder, 100, places(folder)["first pixel"][0])
    folder.remove(shard_name("test"))
    named = found(folder)
    code, lines = verify(folder.url, cwd=folder.path)
    assert code == 2
    assert lines[:-1] == [str(m) for m in named] and len(named) == 3
    assert lines[-1].startswith(f"imaml: {folder.url}: 3 stretches of bytes do not match the index of blobs; ")
    url, options = moto_bucket
    code, lines = verify(url, "--endpoint", options.endpoint, cwd=folder.path)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"imaml: data.url: {url} has no index.json; ")
