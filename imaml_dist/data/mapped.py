"""Class records in a folder: shards are mapped where they lie, and every record is verified before its first use."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imaml_dist.data.blocks import record_of
from imaml_dist.data.index import ClassEntry, ShardEntry
from imaml_dist.data.verified import damage, damaged, missing, wrong_size
from imaml_dist.errors import ChangedError, DataError


class MappedShards:
    """Pixel bytes of class records, in place. Safe to use from several threads.

    Args:
        folder: of the shards.
        shards: as the index lists them.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry]) -> None:
        self._folder, self._shards = folder, shards
        self._open: dict[int, _Mapping] = {}

    @contextmanager
    def held(self, entries: Sequence[ClassEntry]) -> Iterator[list[memoryview]]:
        """Verified pixel bytes of each entry, to be copied from within the block.

        Raises:
            DataError: a shard is missing, or its size or a record's CRC32 is not what the index says.
            ChangedError: at the end of the block: somebody wrote to a shard meanwhile; what was copied is not to be used.
        """
        used = {number: self._mapping(number) for number in {entry.shard for entry in entries}}
        yield [used[entry.shard].verified(entry) for entry in entries]
        for mapping in used.values():
            mapping.check_unchanged()

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
        """Nothing is to be ended; mappings go with their last user."""

    def _mapping(self, number: int) -> _Mapping:
        found = self._open.get(number)
        if found is None or not found.is_unchanged():
            found = self._open[number] = _Mapping(self._folder / self._shards[number].name, self._shards[number])
        return found


class _Mapping:
    """A shard as it was when it was opened."""

    def __init__(self, path: Path, shard: ShardEntry) -> None:
        self._path = path
        self._verified: set[int] = set()
        try:
            self._file = os.open(path, os.O_RDONLY)
            facts = os.fstat(self._file)
            if facts.st_size != shard.size:
                raise wrong_size(str(path), facts.st_size, shard)
            self._identity = (facts.st_size, facts.st_mtime_ns)
            self._bytes = memoryview(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise missing(str(path)) from error
        except (OSError, ValueError) as error:
            raise DataError(
                f"shard {path} cannot be read ({error}); mend that or prepare the data set again"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def is_unchanged(self) -> bool:
        facts = os.fstat(self._file)
        return (facts.st_size, facts.st_mtime_ns) == self._identity

    def check_unchanged(self) -> None:
        if not self.is_unchanged():
            raise ChangedError(
                f"shard {self._path} was written to while it was read; let nobody write to a data set in use"
            )

    def verified(self, entry: ClassEntry) -> memoryview:
        record = record_of(entry)
        pixels = self._bytes[record.begin : record.end]
        if record.begin not in self._verified:
            if damaged(pixels, record):
                # Somebody may be writing to it at this moment: then it is not damaged but changed.
                self.check_unchanged()
                raise damage(str(self._path), record)
            self._verified.add(record.begin)
        return pixels
