"""Class records in a folder: read where they lie, every one verified before its first use and whenever its shard was written to.

By positioned reads into memory of one's own, not by mapping: a mapped file that somebody cuts short ends the process.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imaml_dist.data.blocks import Record, record_of
from imaml_dist.data.index import ClassEntry, ShardEntry
from imaml_dist.data.records import Images
from imaml_dist.data.verified import damage, missing, open_files, wrong_size
from imaml_dist.errors import ChangedError, DataError

LOOKS = 3
"""At a shard that is written to while it is read, before giving up."""

_PIECE = 1 << 20


class ShardsInPlace:
    """Images of class records in a folder. Safe to use from several threads.

    Args:
        folder: of the shards.
        shards: as the index lists them.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry]) -> None:
        self._folder, self._shards = folder, shards
        self._open: dict[int, _Shard] = {}
        self._lock = threading.Lock()
        self._most_open = open_files()

    def gather(self, wanted: Sequence[tuple[ClassEntry, Sequence[int]]]) -> list[Images]:
        """Chosen images, `[k, H, W, C]` each, as stored.

        Raises:
            DataError: a shard is missing, or its size or a record's CRC32 is not what the index says.
            ChangedError: somebody writes to a shard all the time.
        """
        for look in range(1, LOOKS + 1):
            used = {number: self._shard(number) for number in {entry.shard for entry, _ in wanted}}
            try:
                found = [used[entry.shard].images(entry, numbers) for entry, numbers in wanted]
                for shard in used.values():
                    shard.check_unchanged()
            except ChangedError:
                if look == LOOKS:
                    raise
            else:
                return found
        raise AssertionError

    def fetch(self, entries: Sequence[ClassEntry]) -> None:
        """Nothing is to be fetched."""

    def check(self) -> None:
        """Look at every shard, so that what is missing is known before anything is computed.

        Raises:
            DataError: a shard is missing, or its size is not what the index says.
        """
        for shard in self._shards:
            try:
                size = (self._folder / shard.name).stat().st_size
            except OSError as error:
                raise missing(str(self._folder / shard.name)) from error
            if size != shard.size:
                raise wrong_size(str(self._folder / shard.name), size, shard)

    def close(self) -> None:
        """Nothing runs in the background; files are closed with their last user."""

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            found = self._open.pop(number, None)
            if found is None or not found.is_unchanged():
                found = _Shard(self._folder / self._shards[number].name, self._shards[number])
            self._open[number] = found  # the last one used is the last one in the dictionary
            while len(self._open) > self._most_open:
                del self._open[next(iter(self._open))]
            return found


class _Shard:
    """A shard as it was when it was opened."""

    def __init__(self, path: Path, shard: ShardEntry) -> None:
        self._path = path
        self._verified: set[int] = set()
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise missing(str(path)) from error
        except OSError as error:
            raise DataError(f"shard {path} cannot be read ({error.strerror}); mend that") from error
        size, *self._times = self._facts()
        if size != shard.size:
            raise wrong_size(str(path), size, shard)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _facts(self) -> list[int]:
        facts = os.fstat(self._file)
        return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]

    def is_unchanged(self) -> bool:
        return self._facts()[1:] == self._times

    def check_unchanged(self) -> None:
        if not self.is_unchanged():
            raise ChangedError(
                f"shard {self._path} was written to while it was read; let nobody write to a data set in use"
            )

    def images(self, entry: ClassEntry, numbers: Sequence[int]) -> Images:
        record = record_of(entry)
        if record.begin not in self._verified:
            self._verify(record)
        found = np.empty((len(numbers), *entry.shape[1:]), dtype=np.uint8)
        rows = found.reshape(len(numbers), -1)
        size = rows.shape[1]
        for row, number in zip(rows, numbers, strict=True):
            if os.preadv(self._file, [row.data], record.begin + number * size) != size:
                raise ChangedError(
                    f"shard {self._path} was cut short while it was read; let nobody write to a data set in use"
                )
        return found

    def _verify(self, record: Record) -> None:
        crc32, place = 0, record.begin
        while place < record.end:
            piece = os.pread(self._file, min(_PIECE, record.end - place), place)
            if not piece:
                break
            crc32, place = zlib.crc32(piece, crc32), place + len(piece)
        if place < record.end or crc32 != record.crc32:
            self.check_unchanged()  # somebody may be writing at this moment: then it is not damaged but changed
            raise damage(str(self._path), record)
        self._verified.add(record.begin)
