"""`index.json`: what is in a data set, where every byte of it lies, and how to recognise it.

    {format, version, name, provenance, image: [H, W, C],
     shards: [{name, size, sha256, gaps}],
     splits: {train: [{key, shard, offset, header, shape, crc32, rot?}], val: [...], test: [...]},
     fingerprint}

Classes are listed in bytewise order of their keys; the rank in that list is the canonical class id. `offset` is the
byte at which the class's `images.npy` member begins inside the shard and `header` the length of its npy header, so
pixel bytes are read in place. `gaps` has the CRC32 of every stretch of a shard that is not pixels: before the first class,
between two, and behind the last one; so whatever is damaged can be named by its bytes, without trusting the tar. The
fingerprint is the sha256 of everything else in canonical JSON: relative names and digests only, so copies on different
storage agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from imaml_dist.errors import ChangedError, DataError, MissingBucketError, MissingError
from imaml_dist.storage.protocol import Storage

FORMAT = "imaml-class-records"
VERSION = 2
FILE_NAME = "index.json"
MAX_BYTES = 32 << 20
READS = 3
"""Of an index, before it counts as damaged."""
MAX_HEADER = 4096
"""Bytes of an npy header; real ones have 128."""
SPLITS = ("train", "val", "test")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")


@dataclass(frozen=True)
class ShardEntry:
    """A tar file: name relative to the index, size in bytes, sha256 in hex, CRC32 of what lies between its classes' pixels."""

    name: str
    size: int
    sha256: str
    gaps: tuple[int, ...]


@dataclass(frozen=True)
class ClassEntry:
    """A class: where its images lie.

    Attributes:
        key: unique within the split.
        shard: position in the list of shards.
        offset: byte of the shard at which `images.npy` begins.
        header: bytes of the npy header; pixels begin at `offset + header`.
        shape: `(n, H, W, C)`, uint8.
        crc32: of the pixel bytes.
        rot: quarter turns counter-clockwise applied when reading; a derived class shares its source's bytes.
    """

    key: str
    shard: int
    offset: int
    header: int
    shape: tuple[int, int, int, int]
    crc32: int
    rot: int = 0

    @property
    def pixels(self) -> tuple[int, int]:
        """Bytes [begin, end) of the pixels within the shard."""
        begin = self.offset + self.header
        return begin, begin + math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """A whole data set."""

    name: str
    provenance: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    splits: dict[str, tuple[ClassEntry, ...]]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`, as networks take it."""
        _, height, width, channels = next(c for split in self.splits.values() for c in split).shape
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """sha256 in hex of the canonical JSON of everything."""
        return hashlib.sha256(canonical(self._as_dict())).hexdigest()

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps({**self._as_dict(), "fingerprint": self.fingerprint}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Index:
        """Read an index; `where` names it in errors.

        Raises:
            DataError: not JSON, another format or version, a missing field, unsorted keys, or a wrong fingerprint.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT or raw["version"] != VERSION:
                raise DataError(
                    f"{where}: format {raw['format']!r} version {raw['version']!r} is not {FORMAT!r} version {VERSION}; "
                    "prepare the data set again"
                )
            index = Index(
                name=str(raw["name"]),
                provenance=dict(raw["provenance"]),
                shards=tuple(
                    ShardEntry(str(s["name"]), int(s["size"]), str(s["sha256"]), tuple(int(gap) for gap in s["gaps"]))
                    for s in raw["shards"]
                ),
                splits={
                    str(split): tuple(_class_entry(c) for c in classes) for split, classes in raw["splits"].items()
                },
            )
            claimed = raw["fingerprint"]
            computed = index.fingerprint
            _check(index, where)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{where} is not a readable index ({type(error).__name__}: {error}); prepare the data set again"
            ) from error
        if claimed != computed:
            raise DataError(
                f"{where}: the fingerprint says {str(claimed)[:12]}, the content has {computed[:12]}; "
                "the file was changed by hand or damaged: prepare the data set again"
            )
        return index

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "provenance": self.provenance,
            "shards": [asdict(s) for s in self.shards],
            "splits": {split: [asdict(c) for c in classes] for split, classes in self.splits.items()},
        }


def read_index(storage: Storage) -> Index:
    """The index of a data set; read again if it was replaced meanwhile, or may have been damaged on its way.

    Raises:
        DataError: there is none, it is too large to be one, or see `Index.from_json`.
        MissingBucketError: there is no such bucket.
        ChangedError: it is replaced again and again.
    """
    try:
        for _ in range(READS - 1):
            with suppress(ChangedError, DataError):
                return _read(storage)
        return _read(storage)
    except MissingBucketError:
        raise
    except MissingError as error:
        raise DataError(
            f"data.url: {storage.url} has no {FILE_NAME}; check the URL, or write the data set with `imaml prepare`, which puts "
            "the index last"
        ) from error


def _read(storage: Storage) -> Index:
    where, found = f"{storage.url}/{FILE_NAME}", storage.stat(FILE_NAME)
    if found.size > MAX_BYTES:
        raise DataError(f"{where} is {found.size} bytes long, an index has at most {MAX_BYTES}; check the URL")
    return Index.from_json(storage.read(FILE_NAME, version=found.version), where)


def pixel_ranges(index: Index) -> list[list[tuple[int, int]]]:
    """Per shard, the bytes [begin, end) of its classes' pixels in their order; classes that share them count once."""
    ranges: list[set[tuple[int, int]]] = [set() for _ in index.shards]
    for classes in index.splits.values():
        for entry in classes:
            ranges[entry.shard].add(entry.pixels)
    return [sorted(of_shard) for of_shard in ranges]


def _class_entry(raw: dict[str, Any]) -> ClassEntry:
    n, height, width, channels = (int(v) for v in raw["shape"])
    return ClassEntry(
        key=str(raw["key"]),
        shard=int(raw["shard"]),
        offset=int(raw["offset"]),
        header=int(raw["header"]),
        shape=(n, height, width, channels),
        crc32=int(raw["crc32"]),
        rot=int(raw["rot"]),
    )


def _check(index: Index, where: str) -> None:
    if not any(index.splits.values()):
        raise DataError(f"{where} lists no class; prepare the data set again")
    shape = next(c for classes in index.splits.values() for c in classes).shape[1:]
    names: set[str] = set()
    for shard in index.shards:
        if not _SHARD_NAME.match(shard.name) or shard.size < 1 or shard.name in names:
            raise DataError(
                f"{where}: shard {shard.name[:80]!r} of {shard.size} bytes: not a plain file name, listed twice, or empty"
            )
        if not all(0 <= gap < 1 << 32 for gap in shard.gaps):
            raise DataError(f"{where}: shard {shard.name} has gaps that are no CRC32 numbers")
        names.add(shard.name)
    for split, classes in index.splits.items():
        keys = [c.key.encode() for c in classes]
        if keys != sorted(set(keys)):
            raise DataError(f"{where}: the classes of split {split!r} are not in strict bytewise order of their keys")
        for entry in classes:
            if not 0 <= entry.shard < len(index.shards) or min(entry.offset, entry.header) < 0 or min(entry.shape) < 1:
                raise DataError(f"{where}: class {entry.key!r} has an impossible place or shape {entry.shape}")
            if entry.shape[1:] != shape or entry.rot not in range(4) or (entry.rot % 2 and shape[0] != shape[1]):
                raise DataError(
                    f"{where}: class {entry.key!r} has images of {entry.shape[1:]} turned {entry.rot} times, others {shape}"
                )
            if not 0 < entry.header <= MAX_HEADER or entry.pixels[1] > index.shards[entry.shard].size:
                raise DataError(
                    f"{where}: class {entry.key!r} has a header of {entry.header} bytes and ends at byte {entry.pixels[1]}: "
                    "not an npy header, or behind the end of its shard"
                )
    for shard, ranges in zip(index.shards, pixel_ranges(index), strict=True):
        if any(before[1] > after[0] for before, after in itertools.pairwise(ranges)):
            raise DataError(f"{where}: classes of shard {shard.name} overlap")
        if len(shard.gaps) != len(ranges) + 1:
            raise DataError(f"{where}: shard {shard.name} has {len(ranges)} classes and {len(shard.gaps)} gaps")


def canonical(value: Mapping[str, Any]) -> bytes:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
