"""Walking a tar without trusting it: only plain files with plain names, nothing unpacked, nothing larger than it may be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from imaml_dist.errors import DataError

BLOCK = 512
MAX_NAME, MAX_EXTENSION, MAX_MEMBERS = 512, 64 << 10, 1 << 20
"""Bytes of a name and of an extended header, and members of one tar."""

_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_PLAIN = (b"0", b"\0")
_FOLDER = b"5"
_EXTENDED, _LONG_NAME = (b"x", b"X"), b"L"


@dataclass(frozen=True)
class Member:
    """A file within a tar.

    Attributes:
        name: relative, without `..`.
        header: byte at which its first header begins.
        offset: byte at which its content begins.
        size: of the content in bytes.
    """

    name: str
    header: int
    offset: int
    size: int


def members(file: BinaryIO, size: int, where: str) -> Iterator[Member]:
    """The files of a tar (USTAR, PAX or GNU names), in their order. Folders are passed over.

    Args:
        file: open for reading, seekable.
        size: of the whole tar.
        where: names it in errors.

    Raises:
        DataError: a damaged header, an end before its time, bytes behind the end, links, devices, sparse files, names that lead
            elsewhere, or more or larger headers than allowed; with the byte.
    """
    place, begin, count = 0, 0, 0
    extended: dict[str, bytes] = {}
    while True:
        file.seek(place)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _refused(where, place, "the archive ends before its end mark")
        if not any(header):
            _check_end(file, place, size, where)
            return
        kind, length = header[156:157], _number(header[124:136], where, place)
        if _number(header[148:156], where, place) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise _refused(where, place, "a header that does not match its own checksum")
        content = place + BLOCK
        if kind in _EXTENDED or kind == _LONG_NAME:
            if not 0 <= length <= MAX_EXTENSION:
                raise _refused(
                    where, place, f"an extended header of {length} bytes, at most {MAX_EXTENSION} are allowed"
                )
            told = file.read(length)
            extended |= _pax(told, where, place) if kind in _EXTENDED else {"path": told.rstrip(b"\0")}
            place = content + _padded(length)
            continue
        if kind not in (*_PLAIN, _FOLDER):
            raise _refused(
                where,
                place,
                f"a member of type {kind!r}: only plain files are allowed, no links, devices or sparse files",
            )
        length = int(extended.get("size", length))
        if not 0 <= length <= size - content:
            raise _refused(where, place, f"a member of {length} bytes, which is more than the archive has")
        if kind == _FOLDER and length:
            raise _refused(where, place, "a folder with content")
        if (count := count + 1) > MAX_MEMBERS:
            raise _refused(where, place, f"more than {MAX_MEMBERS} members")
        if kind in _PLAIN:
            yield Member(_name(extended.get("path") or _own_name(header), where, place), begin, content, length)
        place = begin = content + _padded(length)
        extended = {}


def _check_end(file: BinaryIO, place: int, size: int, where: str) -> None:
    file.seek(place)
    while piece := file.read(1 << 20):
        if any(piece):
            raise _refused(where, place, "bytes behind the end mark (several archives in one file, or damage)")
    if size - place < 2 * BLOCK:
        raise _refused(where, place, "half an end mark")


def _pax(told: bytes, where: str, place: int) -> dict[str, bytes]:
    """Records `<length> <key>=<value>\\n` of an extended header."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(told):
        try:
            space = told.index(b" ", at, at + 20)
            end = at + int(told[at:space])
            key, _, value = told[space + 1 : end - 1].partition(b"=")
            if not space < end <= len(told) or told[end - 1 : end] != b"\n":
                raise ValueError
        except ValueError as error:
            raise _refused(where, place, "an extended header that cannot be read") from error
        if key.startswith(b"GNU.sparse"):
            raise _refused(where, place, "a sparse file")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        at = end
    if not re.fullmatch(rb"[0-9]{1,20}", found.get("size", b"0")):
        raise _refused(where, place, "an extended header that cannot be read")
    return found


def _own_name(header: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _name(raw: bytes, where: str, place: int) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _refused(where, place, "a name that is not UTF-8") from error
    parts = name.removeprefix("./").split("/")
    if len(raw) > MAX_NAME or "\0" in name or "\\" in name or not all(parts) or {".", ".."} & set(parts):
        raise _refused(where, place, f"the name {name[:80]!r}, which is empty, too long, absolute, or leads elsewhere")
    return "/".join(parts)


def _number(field: bytes, where: str, place: int) -> int:
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big", signed=False) if field[:1] == b"\x80" else -1
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise _refused(where, place, "a header with a number that is none")
    return int(digits[1] or b"0", 8)


def _padded(length: int) -> int:
    return (length + BLOCK - 1) // BLOCK * BLOCK


def _refused(where: str, place: int, what: str) -> DataError:
    return DataError(f"{where}, byte {place}: {what}; write the shard again as docs/preparing.md says")
