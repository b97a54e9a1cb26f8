"""A folder as storage, in what sets it apart from a bucket; the rest is in `test_contract`."""

import errno
import fcntl
import itertools
import os
import signal
import stat
import threading
import time

import pytest

from imaml_dist.errors import ChangedError, InputError, MissingError, StorageError
from imaml_dist.storage import folder as module
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.protocol import ABSENT


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_paths_and_file_urls(tmp_path):
    (tmp_path / "with space").mkdir()
    (tmp_path / "with space" / "a").write_bytes(b"1")
    for url in (tmp_path / "with space", str(tmp_path / "with space"), f"file://{tmp_path}/with%20space"):
        assert open_storage(url).read("a") == b"1"
        assert open_storage(url).url == str(tmp_path / "with space")


def test_a_file_url_may_name_this_host(tmp_path):
    for url in (f"file://localhost{tmp_path}/a%3Fb", f"file:{tmp_path}/a%3Fb"):
        assert open_storage(url).url == f"{tmp_path}/a?b"


@pytest.mark.parametrize(
    "url", ["file://data", "file://data/glyphs", "file://[bad", "file:///a?b", "file:///a#b", "file:////a"]
)
def test_a_file_url_with_anything_but_a_path_is_refused(url):
    with pytest.raises(InputError, match="not of the form file:///path; give the whole path"):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3:/bucket/prefix", "gs:/bucket", "S3:/bucket", "s3:bucket/prefix"])
def test_a_url_with_one_slash_is_refused(url):
    with pytest.raises(InputError, match=f"two slashes behind the colon; add them, or write ./{url} for a path"):
        open_storage(url)
    assert open_storage(f"./{url}").url == url


@pytest.mark.parametrize("url", ["a\0b", "a\ud800", "file:///a%00b", "file:///a%FF", "s3://bucket/\udcff", "s3://b/\0"])
def test_a_url_that_is_no_text_is_refused_and_can_be_printed(url):
    with pytest.raises(InputError, match="it has a NUL in it or is not UTF-8; give another") as refused:
        open_storage(url)
    assert str(refused.value).isprintable() and str(refused.value).isascii()


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


def test_names_that_are_not_utf_8_and_links_to_nowhere(tmp_path):
    storage = Folder(tmp_path)
    storage.write("é", b"1")
    (tmp_path / os.fsdecode(b"z\xff")).write_bytes(b"22")
    for link, target in (("loop", "loop"), ("broken", "nothing")):
        (tmp_path / link).symlink_to(target)
        with pytest.raises(MissingError, match=f"{link} does not exist"):
            storage.read(link)
    assert list(storage.names()) == [("z\udcff", 2), ("é", 1)]


def test_a_name_that_is_too_long(tmp_path):
    for storage, name in ((Folder(tmp_path), "a" * 300), (Folder(tmp_path / ("b" * 300)), "a")):
        for ask in (storage.stat, storage.read, storage.remove, lambda name, s=storage: s.write(name, b"1")):
            with pytest.raises(InputError, match=r"\.\.\.: File name too long; give a shorter one"):
                ask(name)


def test_parts_that_killed_writers_left_are_removed(tmp_path):
    for name in (".a.123.part", ".a.0fe1.part", ".a.b.123.part", ".b.123.part", ".a.part"):
        (tmp_path / name).write_bytes(b"1")
    Folder(tmp_path).write("a", b"2")
    assert files(tmp_path) == [".a.b.123.part", ".a.part", ".b.123.part", "a"]


def without_locks(monkeypatch, number, files_too):
    """A file system that answers so to locks on folders, or on anything."""
    flock = fcntl.flock

    def refuse(descriptor, how):
        if files_too or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_where_no_folder_can_be_locked_a_hidden_file_is(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EBADF, files_too=False)
    storage = Folder(tmp_path)
    version = storage.write("a", b"1", only_if=ABSENT)
    with module.exclusive(tmp_path / ".lock"):
        writer = threading.Thread(target=storage.write, args=("a", b"2"))
        writer.start()
        time.sleep(0.2)
        assert storage.read("a", version=version) == b"1"
    writer.join(10)
    assert storage.read("a") == b"2"
    assert list(storage.names()) == [("a", 1)]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.ENOSYS])
def test_without_locks_only_what_needs_them_is_refused_and_at_once(tmp_path, monkeypatch, number):
    without_locks(monkeypatch, number, files_too=True)
    storage, began = Folder(tmp_path), time.monotonic()
    (tmp_path / ".a.123.part").write_bytes(b"of a writer that may live")
    version = storage.write("a", b"1")
    for condition in (ABSENT, version):
        with pytest.raises(StorageError, match="/a: this file system has no locks, so another writer could be faster"):
            storage.write("a", b"2", only_if=condition)
    assert storage.read("a", version=version) == b"1"
    assert (tmp_path / ".a.123.part").exists()
    assert time.monotonic() - began < 5
    with pytest.raises(OSError, match=os.strerror(number)) as refused, module.exclusive(tmp_path / "lock"):
        pass
    assert refused.value.filename == str(tmp_path / "lock")
