"""Walking a tar: agrees with tarfile on what is plain, and refuses the rest before it costs anything."""

import contextlib
import io
import re
import tarfile
import tracemalloc

import pytest
import webdataset

from imaml_dist.data import tar
from imaml_dist.data.tar import members
from imaml_dist.errors import DataError

LONG = "/".join(["a" * 60, "b" * 60, "c" * 60, "d.npy"])
FILES = {"a.json": b"{}", "b/c.images.npy": b"x" * 512, "empty.json": b"", "d.images.npy": b"y" * 2000}
UNICODE = {"grün/猫.json": b"cat", LONG: b"long", "e" * 150 + ".json": b"longer"}


def plain(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def archive(files, format=tarfile.PAX_FORMAT, **fields) -> bytes:
    """As tarfile writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as file:
        for name, content in files.items():
            file.addfile(plain(name, size=len(content), **fields), io.BytesIO(content))
    return buffer.getvalue()


def walk(content: bytes) -> list[tar.Member]:
    return list(members(io.BytesIO(content), len(content), "shard x.tar"))


def refused(content: bytes, byte: int, what: str) -> None:
    with pytest.raises(DataError, match=rf"^shard x\.tar, byte {byte}: .*{re.escape(what)}"):
        walk(content)


def raw(kind=b"0", size=0, name="a.json", **fields) -> bytes:
    """A header, whatever it says."""
    return plain(name, type=kind, size=size, **fields).tobuf(tarfile.GNU_FORMAT)


def resummed(header: bytes, **fields) -> bytes:
    """A header with other bytes at some offsets, and the checksum that goes with them."""
    changed = bytearray(header)
    for place, value in fields.items():
        begin = int(place[1:])
        changed[begin : begin + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def extended(records: bytes, kind=b"x") -> bytes:
    return raw(kind, len(records), "pax") + records + bytes(-len(records) % 512)


def record(key: str, value: bytes) -> bytes:
    line = b" " + key.encode() + b"=" + value + b"\n"
    length = len(line) + 1
    while len(str(length)) + len(line) != length:
        length += 1
    return str(length).encode() + line


END = bytes(1024)
WHOLE = archive(FILES | UNICODE)


@pytest.mark.parametrize(
    ("files", "format", "fields"),
    [
        (FILES | {LONG: b"by prefix"}, tarfile.USTAR_FORMAT, {}),
        (FILES | UNICODE, tarfile.PAX_FORMAT, {"mtime": 12.5, "uname": "jürgen"}),
        (FILES | UNICODE, tarfile.GNU_FORMAT, {"uid": 2**40}),
        ({}, tarfile.PAX_FORMAT, {}),
    ],
    ids=["ustar", "pax", "gnu", "empty"],
)
def test_it_agrees_with_tarfile(files, format, fields):
    content = archive(files, format, **fields)
    found = walk(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        assert [(m.name, m.header, m.offset, m.size) for m in found] == [
            (m.name, m.offset, m.offset_data, m.size) for m in opened
        ]
    assert {m.name: content[m.offset : m.offset + m.size] for m in found} == files


def test_it_agrees_with_what_webdataset_writes():
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:
        for key in ("a/b", "ü" * 80, "c"):
            writer.write({"__key__": key, "images.npy": b"pixels", "json": {"name": key}})
    found = walk(buffer.getvalue())
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as opened:
        assert [(m.name, m.offset) for m in found] == [(m.name, m.offset_data) for m in opened]
    assert len(found) == 6


def test_folders_and_a_leading_dot_are_passed_over():
    content = raw(b"5", name="./") + raw(name="./a.json", size=2) + b"{}".ljust(512, b"\0") + END
    assert [(m.name, m.header, m.offset) for m in walk(content)] == [("a.json", 512, 1024)]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"K", b"g", b"D", b"M", b"V", b"?"])
def test_links_devices_and_whatever_else_is_no_plain_file_are_refused_with_their_byte(kind):
    refused(raw() + raw(kind, linkname="/etc/passwd") + END, 512, "only plain files are allowed")


@pytest.mark.parametrize("key", ["GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.realsize"])
def test_sparse_files_in_extended_headers_are_refused(key):
    refused(raw() + extended(record(key, b"1")) + raw() + END, 512, "a sparse file")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.json", "a/../b.json", "a/./b.json", "a//b.json", "a/", "..", ".", "a\\b", "x" * 513, "a\0b"],
)
def test_names_that_lead_elsewhere_are_refused(name):
    own = [resummed(raw(), _0=name.encode().ljust(100, b"\0"))] if len(name) <= 100 and "\0" not in name else []
    for before in (extended(record("path", name.encode())), extended(name.encode() + b"\0", b"L")):
        refused(raw() + before + raw() + END, 512 + len(before), "the name")
    for header in own:
        refused(raw() + header + END, 512, "the name")


def test_names_that_are_no_text_are_refused():
    refused(resummed(raw(), _0=b"\xff\xfe") + END, 0, "not UTF-8")


def test_times_of_gnu_headers_are_not_taken_for_a_part_of_the_name():
    (found,) = walk(resummed(raw(), _345=b"14610430512\0") + END)
    assert found.name == "a.json"


def test_every_flipped_bit_of_a_header_is_noticed_or_changes_nothing():
    content = archive({"a.json": b"{}"})
    (expected,) = walk(content)
    for place in range(512):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            if 148 <= place < 156:  # the checksum itself may be written in several ways
                with contextlib.suppress(DataError):
                    assert walk(bytes(damaged)) == [expected]
            else:
                refused(bytes(damaged), 0, "")


@pytest.mark.parametrize("size", [10 << 30, 1, 600])
def test_a_member_larger_than_the_archive_is_refused_at_once(size):
    refused(raw() + raw(size=size), 512, f"a member of {size} bytes, which is more than the archive has")


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"9" * 12, b"-1", b"0x7", b"1_0"])
def test_sizes_that_are_none_are_refused(size):
    for kind in (b"0", b"x", b"L"):
        refused(raw() + resummed(raw(kind), _124=size.ljust(12, b"\0")) + END, 512, "")


@pytest.mark.parametrize("size", [b"99999999999", b"9" * 5000, b"-1", b"1_0", b"", b" 1", b"0x1", b"1.5"])
def test_sizes_in_extended_headers_that_are_none_are_refused(size):
    with pytest.raises(DataError, match=r"byte (512|1536|6656): "):
        walk(raw() + extended(record("size", size)) + raw() + END)


def test_a_folder_with_content_is_refused():
    refused(raw(b"5", 512) + raw() + END, 0, "a folder with content")


@pytest.mark.parametrize(
    "records", [b"5 a=b\n", b"7 a=b\n", b"x a=b\n", b"6 a=b", b"-6 a=b\n", b"6a=b\n", b"0 ", b" ", b"9" * 5000, b"\0"]
)
def test_extended_headers_that_cannot_be_read_are_refused(records):
    refused(raw() + extended(records) + raw() + END, 512, "an extended header that cannot be read")


@pytest.mark.parametrize("kind", [b"x", b"L", b"X"])
def test_huge_extended_headers_are_refused_unread(kind):
    for size in (tar.MAX_EXTENSION + 1, 8**11 - 1):
        refused(raw() + raw(kind, size), 512, f"an extended header of {size} bytes, at most 65536 are allowed")


def test_an_archive_cut_anywhere_is_refused():
    for size in range(0, len(WHOLE.rstrip(b"\0")) + 1024, 512):
        with pytest.raises(DataError, match=r"byte \d+: "):
            walk(WHOLE[:size])
    for size in range(0, len(WHOLE.rstrip(b"\0")), 97):
        with pytest.raises(DataError, match=r"byte \d+: "):
            walk(WHOLE[:size])


def test_half_an_end_mark_is_refused():
    refused(raw() + bytes(512), 512, "half an end mark")
    assert walk(raw() + END) == walk(raw() + END + bytes(1 << 21))


@pytest.mark.parametrize("behind", [WHOLE, b"garbage", bytes(3 << 20) + b"x"])
def test_what_is_behind_the_end_is_refused(behind):
    refused(raw() + END + behind, 512, "bytes behind the end mark")


class Endless:
    """A file that has the same piece again and again, for ever."""

    def __init__(self, piece: bytes) -> None:
        self._piece, self._place = piece, 0

    def seek(self, place: int) -> None:
        self._place = place

    def read(self, size: int) -> bytes:
        begin = self._place % len(self._piece)
        self._place += size
        return self._piece[begin : begin + size]


def test_too_many_members_are_refused(monkeypatch):
    assert tar.MAX_MEMBERS == 1 << 20
    monkeypatch.setattr(tar, "MAX_MEMBERS", 10_000)
    with pytest.raises(DataError, match=f"byte {512 * 10_000}: more than 10000 members"):
        list(members(Endless(raw()), 1 << 50, "x"))


def test_a_bomb_costs_no_memory(monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBERS", 20)
    records = b"".join(record("path", b"%06d" % n) for n in range(3000))
    piece = extended(records[:60_000].rpartition(b"\n")[0] + b"\n") + raw()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 20 members"):
            for _ in members(Endless(piece), 1 << 50, "x"):
                pass
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
