"""What every storage promises, asked of a folder, of moto and of a RADOS Gateway."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SERVERS, new_bucket

from imaml_dist.errors import ChangedError, MissingError, StorageError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.protocol import ABSENT, Storage

CONTENT = os.urandom(2_500_000)


@pytest.fixture(params=["folder", *SERVERS])
def storage(request, tmp_path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "folder")
    request.getfixturevalue("aws")
    url, options = new_bucket(request.getfixturevalue(request.param))
    return open_storage(f"{url}/some/prefix", options)


@pytest.mark.parametrize(
    ("begin", "end"), [(0, None), (0, 1), (1, 2), (7, 2_000_001), (2_499_999, None), (5, 5), (0, 0)]
)
def test_a_range_is_exactly_the_bytes_asked_for(storage, begin, end):
    storage.write("a", CONTENT)
    assert storage.read("a", begin, end) == CONTENT[begin:end]


def test_a_stream_comes_in_pieces_of_at_most_1_mib(storage):
    storage.write("a", CONTENT)
    pieces = list(storage.stream("a", 100))
    assert b"".join(pieces) == CONTENT[100:]
    assert max(map(len, pieces)) <= 1 << 20


def test_a_stream_can_be_left_in_the_middle(storage):
    storage.write("a", CONTENT)
    for _ in range(20):
        assert CONTENT.startswith(next(storage.stream("a")))
    assert storage.read("a") == CONTENT


@pytest.mark.parametrize(("begin", "end"), [(0, 4), (1, 4), (3, 4)])
def test_bytes_behind_the_end_are_refused(storage, begin, end):
    storage.write("a", b"123")
    with pytest.raises(ChangedError, match=r"/a .*(ends at byte 3, 4 was asked for|shorter)"):
        storage.read("a", begin, end)


def test_an_empty_object(storage):
    version = storage.write("empty", b"")
    assert storage.read("empty", version=version) == b""
    assert storage.stat("empty").size == 0


def test_what_is_written_is_found(storage):
    version = storage.write("deep/in/it", b"123")
    assert storage.stat("deep/in/it").size == 3
    assert storage.stat("deep/in/it").version == version
    assert storage.read("deep/in/it", version=version) == b"123"


def test_a_write_from_a_file(storage, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    version = storage.write("a", source)
    assert storage.read("a", version=version) == CONTENT
    assert source.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["with space", "a+b", "ü%41", "a//b", "x=y&z", "'quoted'"])
def test_names_are_taken_literally(storage, name):
    if "//" in name and not storage.url.startswith("s3://"):
        pytest.skip("the same as a single one in a path")
    storage.write(name, b"1")
    assert storage.read(name) == b"1"
    assert list(storage.names()) == [(name, 1)]


def test_a_version_that_is_no_more_is_refused(storage):
    old = storage.write("a", b"old")
    new = storage.write("a", b"new")
    assert old != new
    with pytest.raises(ChangedError, match="changed since it was first looked at"):
        storage.read("a", version=old)
    with pytest.raises(ChangedError):
        storage.read("a", 1, 2, version=old)
    assert storage.read("a", 1, 2, version=new) == b"e"


@pytest.mark.parametrize("name", ["a", "deep/a", "deep"])
def test_missing(storage, name):
    storage.write("deep/b", b"1")
    for ask in (storage.stat, storage.read):
        with pytest.raises(MissingError, match=f"{name}.* does not exist"):
            ask(name)
    storage.remove("a")


def test_remove(storage):
    storage.write("a", b"1")
    storage.remove("a")
    with pytest.raises(MissingError):
        storage.stat("a")


def test_names_come_in_bytewise_order_with_their_sizes(storage):
    names = ["a", "a/b", "a-b", "B", "b/c/d", "é", "z"]
    if not storage.url.startswith("s3://"):
        names.remove("a")  # a file cannot be a folder, too
    for size, name in enumerate(names):
        storage.write(name, b"x" * size)
    expected = sorted(((name, size) for size, name in enumerate(names)), key=lambda pair: pair[0].encode())
    assert list(storage.names()) == expected
    assert [name for name, _ in storage.names("a")] == [name for name, _ in expected if name.startswith("a")]
    assert [name for name, _ in storage.names("b/c/")] == ["b/c/d"]
    assert list(storage.names("nothing")) == []


def test_nothing_was_written_yet(storage):
    assert list(storage.names()) == []


def test_a_name_is_given_once(storage):
    version = storage.write("a", b"first", only_if=ABSENT)
    with pytest.raises(ChangedError, match="is there already; another writer was faster"):
        storage.write("a", b"second", only_if=ABSENT)
    assert storage.read("a", version=version) == b"first"


def test_only_the_version_that_was_read_is_replaced(storage):
    first = storage.write("a", b"first")
    second = storage.write("a", b"second", only_if=first)
    with pytest.raises(ChangedError, match="is not what it was any more; another writer was faster"):
        storage.write("a", b"third", only_if=first)
    assert storage.read("a", version=second) == b"second"


def test_what_was_removed_is_not_replaced(storage):
    version = storage.write("a", b"first")
    storage.remove("a")
    with pytest.raises(ChangedError, match="is not what it was any more"):
        storage.write("a", b"second", only_if=version)
    with pytest.raises(MissingError):
        storage.stat("a")


@pytest.mark.parametrize("wanted", ["absent", "version"])
def test_of_racing_writers_one_wins(storage, wanted, request):
    if request.node.callspec.params["storage"] == "moto":
        pytest.skip("moto looks first and writes then, and is no judge of that")
    for round_ in range(5):
        name = f"{wanted}-{round_}"
        only_if = ABSENT if wanted == "absent" else storage.write(name, b"before")
        start = threading.Barrier(4)

        def write(writer: int, name=name, only_if=only_if, start=start) -> bytes | None:
            content = b"%d" % writer * 100_000
            start.wait()
            try:
                storage.write(name, content, only_if=only_if)
            except ChangedError:
                return None
            return content

        with ThreadPoolExecutor(4) as pool:
            winners = [content for content in pool.map(write, range(4)) if content]
        assert len(winners) == 1
        assert storage.read(name) == winners[0]


def test_readers_beside_a_writer_see_whole_contents(storage):
    contents = [b"%d" % digit * 1_500_000 for digit in range(6)]
    storage.write("a", contents[0])
    done = threading.Event()

    def read() -> int:
        seen = 0
        while not done.is_set():
            try:
                assert storage.read("a") in contents
            except ChangedError:
                continue
            seen += 1
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for content in contents:
                storage.write("a", content)
        finally:
            done.set()
        assert sum(reader.result() for reader in readers) > 0


def test_racing_writers_without_a_condition_leave_one_whole_content(storage):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda digit: storage.write("a", b"%d" % digit * 50_000), range(10)))
    content = storage.read("a")
    assert content == content[:1] * 50_000
    assert list(storage.names()) == [("a", 50_000)]


def test_it_pickles(storage):
    storage.write("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.url == storage.url
    assert copy.read("a") == b"1"


def test_in_a_fork(storage):
    storage.write("a", CONTENT)
    child = os.fork()
    if not child:
        try:
            same = storage.read("a") == CONTENT
            storage.write("b", b"of the child")
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    assert storage.read("a") == CONTENT
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage.read("b") == b"of the child"


def test_all_that_is_changed_is_a_storage_error():
    assert issubclass(ChangedError, StorageError)
