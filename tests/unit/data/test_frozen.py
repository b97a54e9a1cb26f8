"""Frozen tasks: the very same episodes again, and nothing that is not what was frozen."""

import contextlib
import hashlib
import json

import pytest
import torch
from helpers.datasets import records, write_blobs

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.data.frozen import MAX_BYTES, FrozenTasks, freeze, publish, read_manifest
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import ConfigError, DataError, InputError
from imaml_dist.storage.folder import Folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return Dataset(str(folder))


@pytest.fixture(scope="module")
def source(dataset):
    return EpisodeSource(dataset, "test", way=3, shot=2, query=2, seed=2**63 - 1)


@pytest.fixture(scope="module")
def content(source):
    return freeze(source, 5)


def read(folder, content):
    (folder / "tasks.jsonl").write_bytes(content)
    return read_manifest(str(folder / "tasks.jsonl"))


def changed(content, *, task=None, **fields):
    """A manifest with fields of its header or of a task replaced, with the sha256 that goes with it."""
    header, *tasks = (json.loads(line) for line in content.splitlines())
    (header if task is None else tasks[task]).update(fields)
    body = b"".join(json.dumps(t).encode() + b"\n" for t in tasks)
    return json.dumps({**header, "sha256": hashlib.sha256(body).hexdigest(), **fields}).encode() + b"\n" + body


def test_frozen_tasks_are_those_of_the_source_to_the_last_bit(dataset, source, content, tmp_path):
    assert freeze(source, 5) == content
    manifest = read(tmp_path, content)
    assert manifest.sha256 == hashlib.sha256(content).hexdigest()
    assert (manifest.split, manifest.way, manifest.shot, manifest.query, len(manifest.tasks)) == ("test", 3, 2, 2, 5)
    frozen = FrozenTasks(dataset, manifest, torch.float64)
    twin = EpisodeSource(dataset, "test", way=3, shot=2, query=2, seed=2**63 - 1, dtype=torch.float64)
    for tasks in (range(5), range(2, 4)):
        got, expected = frozen.episodes(0, tasks), twin.episodes(0, tasks)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(got, name), tensor) and getattr(got, name).dtype == tensor.dtype, name
    for place in ((1, 0), (0, 5)):
        with pytest.raises(InputError, match=r"is not in the manifest; it has tasks 0 to 4 of step 0"):
            frozen.draw(*place)


def test_it_is_published_once(content, source, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/sets/tasks.jsonl"
    assert publish(url, content)
    assert not publish(url, content)
    with pytest.raises(DataError, match=r"sets/tasks\.jsonl is there already and holds something else; choose another"):
        publish(url, freeze(source, 6))
    assert (tmp_path / "sets" / "tasks.jsonl").read_bytes() == content
    monkeypatch.chdir(tmp_path)
    assert publish("here.jsonl", content)
    assert read_manifest("here.jsonl") == read_manifest(url)
    for url in ("sets/", "", "s3://bucket", "s3://me:secret@bucket", "s3://bucket/tasks?secret"):
        with pytest.raises(InputError, match="names no file") as caught:
            publish(url, content)
        assert "secret" not in str(caught.value)


def test_a_server_that_heeds_no_conditions_does_not_lose_them(content, source, tmp_path, monkeypatch):
    class Heedless(Folder):
        def write(self, name, content, *, only_if=None):
            return super().write(name, content)

    for module in ("data.frozen", "storage.opening"):
        monkeypatch.setattr(f"imaml_dist.{module}.Folder", Heedless)
    url = str(tmp_path / "tasks.jsonl")
    assert publish(url, content) and not publish(url, content)
    with pytest.raises(DataError, match="is there already and holds something else"):
        publish(url, freeze(source, 6))
    assert (tmp_path / "tasks.jsonl").read_bytes() == content


def test_file_urls_are_read_as_they_are_everywhere(content, tmp_path):
    assert publish(f"file://{tmp_path}/my%20tasks%23.jsonl", content)
    assert (tmp_path / "my tasks#.jsonl").read_bytes() == content
    assert read_manifest(f"file:{tmp_path}/my%20tasks%23.jsonl") == read_manifest(str(tmp_path / "my tasks#.jsonl"))
    with pytest.raises(InputError, match="not of the form file:///path"):
        publish(f"file://{tmp_path}/tasks.jsonl?x", content)
    with pytest.raises(InputError, match="scheme 'gs' is not supported; give a path, a file:// URL, or s3://"):
        publish("gs://bucket/tasks.jsonl", content)
    with pytest.raises(DataError, match=r"there is no manifest /+no-such-tasks\.jsonl"):
        read_manifest("file:///no-such-tasks.jsonl")


def test_object_storage_holds_them_as_well(content, source, moto_bucket):
    bucket, options = moto_bucket
    url = f"{bucket}/sets/tasks.jsonl"
    assert publish(url, content, options) and not publish(url, content, options)
    assert read_manifest(url, options).sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match="is there already and holds something else"):
        publish(url, freeze(source, 6), options)


def test_too_many_tasks_are_refused(source, monkeypatch):
    monkeypatch.setattr("imaml_dist.data.frozen.MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"--tasks 50: the manifest would have \d+ bytes, 1000 are allowed"):
        freeze(source, 50)


def test_other_data_is_refused(dataset, content, tmp_path):
    write_dataset(tmp_path / "other", "other", {"test": records("test", 8)}, {"made": "for tests"})
    with pytest.raises(DataError, match=r"of data set 'blobs', fingerprint '\w{12}', .* is 'other', '\w{12}'; give"):
        FrozenTasks(Dataset(str(tmp_path / "other")), read(tmp_path, content))
    keys = ["test/c000", "test/c001", "nobody"]
    with pytest.raises(DataError, match="task 2 of the manifest names class 'nobody', which the test split"):
        FrozenTasks(dataset, read(tmp_path, changed(content, task=2, classes=keys)))
    images = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 20]]
    with pytest.raises(DataError, match=r"task 2 of the manifest names image 20 of class 'test/c\d+', which has 20"):
        FrozenTasks(dataset, read(tmp_path, changed(content, task=2, images=images)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "imaml-class-records"}, "is not a imaml-frozen-tasks file of version 1"),
        ({"version": 2}, "is not a imaml-frozen-tasks file of version 1"),
        ({"spec_version": 9}, "follows version 9 of the drawing rules"),
        ({"sha256": "0" * 64}, "does not match its own sha256"),
        ({"split": "dev"}, "header that makes no sense"),
        ({"way": 0}, "header that makes no sense"),
        ({"seed": 1 << 64}, "header that makes no sense"),
        ({"shot": 2.0}, "header that makes no sense"),
        ({"query": True}, "header that makes no sense"),
        ({"tasks": 6}, "has 5 tasks, its header says 6"),
        ({"way": 4}, "has a task 0 that is not 4 classes of 4 different images"),
        ({"task": 1, "images": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]]}, "a task 1 that is not 3 classes of 4"),
        ({"task": 1, "images": [[0, 1, 2, 3], [0, 1, 2, 3]]}, "a task 1 that is not"),
        ({"task": 1, "images": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 2]]}, "a task 1 that is not"),
        ({"task": 1, "images": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, -1]]}, "a task 1 that is not"),
        ({"task": 1, "images": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 1.5]]}, "a task 1 that is not"),
        ({"task": 1, "classes": ["a", "a", "b"]}, "a task 1 that is not"),
        ({"task": 1, "classes": ["a", "b", 3]}, "a task 1 that is not"),
        ({"task": 1, "images": 3}, "is not a readable manifest"),
        ({"task": 1, "images": [[[0], 1, 2, 3]] * 3}, "is not a readable manifest"),
    ],
)
def test_what_is_not_regular_is_refused_in_one_sentence(content, tmp_path, fields, says):
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path, changed(content, **fields))
    assert str(tmp_path / "tasks.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_is_refused(content, tmp_path):
    body = content.index(b"\n") + 1
    for position in range(body, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1
        with pytest.raises(DataError, match="does not match its own sha256"):
            read(tmp_path, bytes(damaged))
    for position in range(0, body, 5):
        damaged = bytearray(content)
        damaged[position] ^= 1
        with contextlib.suppress(DataError):  # of another name or seed it is another manifest
            assert read(tmp_path, bytes(damaged)).sha256 != hashlib.sha256(content).hexdigest()
    for text in (b"", b"\n", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", content[:-1], content + b"\n", content[:300]):
        with pytest.raises(DataError):
            read(tmp_path, text)
    with pytest.raises(DataError, match=r"there is no manifest .*none\.jsonl; check the URL"):
        read_manifest(str(tmp_path / "none.jsonl"))
    with open(tmp_path / "large.jsonl", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match=rf"is {MAX_BYTES + 1} bytes long, a manifest has at most {MAX_BYTES}"):
        read_manifest(str(tmp_path / "large.jsonl"))
