"""Damage of every kind to a shard: what is used is what was written, and all else is named by shard and bytes. Never silent."""

import re
import shutil
import time

import numpy as np
import pytest
from helpers.datasets import records, shard_name, write_blobs

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.index import FILE_NAME, read_index
from imaml_dist.data.prepare.own_shards import index_shards
from imaml_dist.data.verify import mismatches
from imaml_dist.errors import DataError
from imaml_dist.storage.folder import Folder

SHARD = shard_name("val")
OWN = "val-000000.tar"
"""As users call theirs."""

WRITTEN = {r.key: r.images for r in records("val", 8)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_blobs(folder)
    return folder


@pytest.fixture
def shard(whole, tmp_path):
    """A data set of one's own: (bytes of a shard of 128 kB, what writes it)."""
    for path in whole.iterdir():
        shutil.copy(path, tmp_path / path.name)
    return (whole / SHARD).read_bytes(), (tmp_path / SHARD).write_bytes


def refusal(folder) -> str:
    """What reading all classes says; nothing if every pixel is what was written."""
    try:
        dataset = Dataset(str(folder))
        for entry in dataset.classes("val"):
            np.testing.assert_array_equal(dataset.images(entry), WRITTEN[entry.key])
    except DataError as error:
        return str(error)
    return ""


def named(sentence: str) -> tuple[int, int]:
    assert SHARD in sentence
    begin, end = re.search(r"bytes (?:from )?(\d+)(?: to (\d+)| on)", sentence).groups()
    return int(begin), int(end or 1 << 60)


def check(folder, content: bytes, damaged: bytes) -> bool:
    """Damage is refused, or harmless and found by `imaml verify`; both by a range that holds some of it. Whether refused."""
    length = min(len(content), len(damaged))
    both = [np.frombuffer(of[:length], np.uint8) for of in (content, damaged)]
    differs = np.flatnonzero(both[0] != both[1]).tolist()
    if len(content) != len(damaged):
        differs.append(length)
    sentence = refusal(folder)
    if sentence:
        begin, end = named(sentence)
        assert any(begin <= place < end for place in differs), (sentence, differs[:5])
    storage = Folder(folder)
    found = list(mismatches(storage, read_index(storage)))
    assert found, "silent"
    for place in (differs[0], differs[-1]):
        assert any(m.shard == SHARD and m.begin <= place < m.end for m in found), (place, found)
    return bool(sentence)


def test_a_cut_at_every_block_and_at_random_bytes(shard, tmp_path):
    content, write = shard
    random = np.random.default_rng(0).integers(1, len(content), 200).tolist()
    for end in [*range(0, len(content), 512), *random]:
        write(content[:end])
        assert check(tmp_path, content, content[:end]), end


def test_a_thousand_flipped_bits(shard, tmp_path):
    content, write = shard
    generator, refused = np.random.default_rng(1), 0
    for place, bit in zip(generator.integers(0, len(content), 1000), generator.integers(0, 8, 1000), strict=True):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(bit)
        write(damaged)
        refused += check(tmp_path, content, bytes(damaged))
    assert refused > 800  # pixels are most of it; the rest is headers and padding


def test_holes_of_zeros(shard, tmp_path):
    content, write = shard
    for begin in range(0, len(content) - 1024, 3000):
        damaged = content[:begin] + bytes(1024) + content[begin + 1024 :]
        if damaged != content:
            write(damaged)
            check(tmp_path, content, damaged)


def members(content: bytes, folder) -> list[tuple[int, int]]:
    """Where the samples of the shard lie, headers and all."""
    entries = sorted(read_index(Folder(folder)).splits["val"], key=lambda entry: entry.offset)
    begins = [entry.offset - 512 for entry in entries]
    return list(zip(begins, [*begins[1:], len(content) - 10_240], strict=True))


def test_swapped_duplicate_and_missing_members(shard, tmp_path):
    content, write = shard
    places = members(content, tmp_path)
    samples = [content[a:b] for a, b in places]
    tail = content[places[-1][1] :]
    swapped = [samples[1], samples[0], *samples[2:]]
    for name, changed in {
        "swapped": swapped,
        "duplicate": [samples[0], *samples],
        "instead of another": [samples[0], samples[0], *samples[2:]],
        "missing": samples[1:],
        "none": [],
    }.items():
        damaged = b"".join(changed) + tail
        write(damaged)
        assert check(tmp_path, content, damaged), name
    for appended in (b"x", bytes(512), content):
        write(content + appended)
        assert check(tmp_path, content, content + appended)


def refusal_of_index(storage: Folder) -> str:
    """What indexing says; nothing if it is done."""
    try:
        index_shards(storage, "fuzz")
    except DataError as error:
        return str(error)
    return ""


def mutated(content: bytes, generator) -> bytes:
    """One to four changes of the kinds that disks, networks and enemies make."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        a, b = sorted(generator.integers(0, len(data) + 1, 2).tolist())
        at = int(generator.integers(0, max(1, len(data) - 512))) // 512 * 512
        match int(generator.integers(0, 9)):
            case 0:
                data[a : a + 1] = bytes([int(generator.integers(256))])
            case 1:
                del data[a:b]
            case 2:
                data[a:a] = data[a : min(b, a + 4096)]
            case 3:
                data[a : a + 16] = generator.bytes(16)
            case 4:
                data[at + 124 : at + 136] = b"%011o\0" % int(generator.integers(0, 1 << 33))
            case 5:
                data[at + 156 : at + 157] = b"0123456xgLKSXVD\x00"[int(generator.integers(16)) :][:1]
            case 6:
                data[at : at + 512] = bytes(512)
            case 7:
                data[at + 148 : at + 156] = b"%06o\0 " % (
                    sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512])
                )
            case 8:
                data[:] = data[: max(1, b)]
        if not data:
            data[:] = b"\0"
    return bytes(data)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_mutated_shards_are_refused_in_one_way_only(shard, tmp_path, count):
    content, write = shard
    generator = np.random.default_rng(2)
    refused, longest = 0, 0.0
    for _ in range(count):
        write(damaged := mutated(content, generator))
        began = time.monotonic()
        sentence = refusal(tmp_path)
        longest = max(longest, time.monotonic() - began)
        assert not sentence or SHARD in sentence
        refused += bool(sentence)
        if damaged != content:
            storage = Folder(tmp_path)
            assert sentence or list(mismatches(storage, read_index(storage)))
    assert refused > count / 2
    assert longest < 10, "hangs"


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_mutated_shards_of_users_are_indexed_or_refused_in_one_way_only(shard, tmp_path, count):
    """Nothing is known of these beforehand; what is indexed can be read."""
    content, _ = shard
    generator = np.random.default_rng(3)
    for path in tmp_path.iterdir():
        path.unlink()
    storage, indexed, longest = Folder(tmp_path), 0, 0.0
    for _ in range(count):
        (tmp_path / OWN).write_bytes(mutated(content, generator))
        storage.remove(FILE_NAME)
        began = time.monotonic()
        sentence = refusal_of_index(storage)
        longest = max(longest, time.monotonic() - began)
        if sentence:
            assert OWN in sentence or FILE_NAME in sentence
            continue
        indexed += 1
        dataset = Dataset(str(tmp_path))
        for entry in dataset.classes("val"):
            assert dataset.images(entry).shape == entry.shape
    assert 0 < indexed < count
    assert longest < 10, "hangs"
