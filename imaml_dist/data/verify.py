"""Checking every byte of a data set against its index, and naming all that does not match."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imaml_dist.data.blocks import Record, record_of
from imaml_dist.data.index import Index
from imaml_dist.errors import MissingError
from imaml_dist.storage.protocol import Storage


@dataclass(frozen=True)
class Mismatch:
    """Bytes [begin, end) of a shard that are not what the index was made of."""

    shard: str
    member: str
    begin: int
    end: int

    def __str__(self) -> str:
        return f"shard {self.shard}, bytes {self.begin} to {self.end}: {self.member}"


@dataclass(frozen=True)
class _Stretch:
    """Bytes of a shard with one CRC32."""

    begin: int
    end: int
    crc32: int
    member: str


def mismatches(
    storage: Storage, index: Index, progress: Callable[[int, int], None] | None = None
) -> Iterator[Mismatch]:
    """Read every shard once, a piece at a time, and yield what does not match.

    Args:
        storage: of the shards.
        index: of the data set.
        progress: called with (bytes read, bytes in all).

    Raises:
        StorageError: storage fails for longer than its options allow.
    """
    total, before = sum(shard.size for shard in index.shards), 0
    for number, shard in enumerate(index.shards):
        try:
            stat = storage.stat(shard.name)
        except MissingError:
            yield Mismatch(shard.name, "the shard is missing", 0, shard.size)
            continue
        if stat.size < shard.size:
            yield Mismatch(shard.name, "missing, the shard is too short", stat.size, shard.size)
        elif stat.size > shard.size:
            yield Mismatch(shard.name, "not ours, the shard is too long", shard.size, stat.size)
        end = min(stat.size, shard.size)
        pieces = storage.stream(shard.name, 0, end, version=stat.version) if end else iter(())
        whole, found = hashlib.sha256(), False
        stretches, crc32, place = _stretches(index, number), 0, 0
        for piece in pieces:
            whole.update(piece)
            left = memoryview(piece)
            while len(left):
                stretch = stretches[0]
                part = left[: stretch.end - place]
                crc32, place, left = zlib.crc32(part, crc32), place + len(part), left[len(part) :]
                if place == stretch.end:
                    if crc32 != stretch.crc32:
                        found = True
                        yield Mismatch(shard.name, stretch.member, stretch.begin, stretch.end)
                    del stretches[0]
                    crc32 = 0
            if progress is not None:
                progress(before + place, total)
        before += shard.size
        if not found and stat.size == shard.size and whole.hexdigest() != shard.sha256:
            yield Mismatch(shard.name, "the sha256 differs where no CRC32 does", 0, shard.size)


def _stretches(index: Index, number: int) -> list[_Stretch]:
    """The pixels of a shard's classes and what lies between them, in order; a gap of no bytes is none."""
    shard = index.shards[number]
    records: dict[int, Record] = {}
    for classes in index.splits.values():
        for entry in classes:
            if entry.shard == number:
                record = record_of(entry)
                records.setdefault(record.begin, record)
    found: list[_Stretch] = []
    place, before = 0, ""
    for begin, gap in zip(sorted(records), shard.gaps, strict=False):
        record = records[begin]
        between = f"description of class {before!r} and headers" if before else "headers"
        found.append(_Stretch(place, begin, gap, f"{between} of class {record.key!r}"))
        found.append(_Stretch(begin, record.end, record.crc32, f"images of class {record.key!r}"))
        place, before = record.end, record.key
    found.append(_Stretch(place, shard.size, shard.gaps[-1], f"description of class {before!r} and end of the archive"))
    return [stretch for stretch in found if stretch.end > stretch.begin]
