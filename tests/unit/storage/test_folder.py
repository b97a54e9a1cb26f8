"""A folder as storage, in what sets it apart from a bucket; the rest is in `test_contract`."""

import itertools
import os
import signal
import threading
import time

import pytest

from imaml_dist.errors import ChangedError, InputError, MissingError, StorageError
from imaml_dist.storage import folder as module
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_paths_and_file_urls(tmp_path):
    (tmp_path / "with space").mkdir()
    (tmp_path / "with space" / "a").write_bytes(b"1")
    for url in (tmp_path / "with space", str(tmp_path / "with space"), f"file://{tmp_path}/with%20space"):
        assert open_storage(url).read("a") == b"1"
        assert open_storage(url).url == str(tmp_path / "with space")


@pytest.mark.parametrize("url", ["gs://bucket/a", "http://host/a", "S4://bucket", "http://[bad"])
def test_other_schemes_are_refused(url):
    with pytest.raises(InputError, match="is not supported"):
        open_storage(url)


def test_a_refused_url_is_told_without_its_secrets():
    with pytest.raises(InputError) as refused:
        open_storage("gs://user:canary@bucket/a")
    assert "canary" not in str(refused.value)


def test_nothing_is_made_before_the_first_write(tmp_path):
    storage = open_storage(tmp_path / "new" / "folder")
    with pytest.raises(MissingError):
        storage.read("a")
    assert not (tmp_path / "new").exists()
    storage.write("a", b"1")
    assert files(tmp_path / "new" / "folder") == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, step):
    storage = Folder(tmp_path)
    version = storage.write("a", b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(module.os, step, full)
        with pytest.raises(StorageError, match="/a: No space left on device"):
            storage.write("a", b"new")
    assert storage.read("a", version=version) == b"old"
    assert files(tmp_path) == ["a"]


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path, monkeypatch):
    storage = Folder(tmp_path)
    storage.write("a", b"old")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(module.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            storage.write("a", b"new")
    assert storage.read("a") == b"old"
    assert files(tmp_path) == ["a"]
    assert storage.write("a", b"new") == storage.stat("a").version


def test_a_writer_that_is_killed_leaves_a_whole_content_and_no_lock(tmp_path):
    storage = Folder(tmp_path)
    storage.write("a", b"0" * 5_000_000)
    for pause in (0.02, 0.03, 0.05, 0.08):
        writer = os.fork()
        if not writer:
            try:
                for digit in itertools.cycle(range(10)):
                    storage.write("a", b"%d" % digit * 5_000_000)
            finally:
                os._exit(1)
        time.sleep(pause)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        content = storage.read("a")
        assert content == content[:1] * 5_000_000
        assert [name for name, _ in storage.names()] == ["a"]
    began = time.monotonic()
    storage.write("a", b"1")
    assert time.monotonic() - began < 5


def test_a_file_that_is_replaced_in_mid_read_is_read_on_or_refused(tmp_path):
    storage = Folder(tmp_path)
    storage.write("a", b"1" * 5_000_000)
    stream = storage.stream("a")
    first = next(stream)
    storage.write("a", b"2" * 5_000_000)
    # The old file is still open, and whole.
    assert first + b"".join(stream) == b"1" * 5_000_000


@pytest.mark.parametrize("size", [0, 3_000_000, 6_000_000])
def test_a_file_that_is_written_over_in_mid_read_is_refused(tmp_path, size):
    storage = Folder(tmp_path)
    storage.write("a", b"1" * 5_000_000)
    stream = storage.stream("a")
    next(stream)
    (tmp_path / "a").write_bytes(b"2" * size)
    with pytest.raises(ChangedError, match=r"changed while it was read|ends at byte"):
        list(stream)


def test_a_file_behind_a_file_is_missing(tmp_path):
    storage = Folder(tmp_path)
    storage.write("a", b"1")
    with pytest.raises(MissingError):
        storage.read("a/b")


def test_a_lock_that_others_hold_is_waited_for(tmp_path):
    storage = Folder(tmp_path)
    with module.exclusive(tmp_path) as held:
        assert held
        writer = threading.Thread(target=storage.write, args=("a", b"1"))
        writer.start()
        time.sleep(0.2)
        assert files(tmp_path) == []
    writer.join(10)
    assert storage.read("a") == b"1"


def test_hidden_files_are_no_objects(tmp_path):
    storage = Folder(tmp_path)
    storage.write("a", b"1")
    (tmp_path / ".b.1.part").write_bytes(b"2")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c").write_bytes(b"3")
    assert list(storage.names()) == [("a", 1)]
