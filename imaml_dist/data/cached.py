"""Class records in object storage: fetched in blocks, verified, and kept in the node's cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from imaml_dist.data.blocks import Block, blocks_of, record_of
from imaml_dist.data.cache import NodeCache
from imaml_dist.data.index import ClassEntry, Index
from imaml_dist.data.verified import damage, damaged, missing, wrong_size
from imaml_dist.errors import ChangedError, DataError, MissingError
from imaml_dist.storage.protocol import Storage

FETCHES = 3
"""Of a block that arrives damaged or is replaced meanwhile, before that is believed."""

SWEEP_S = 1.0
"""How long this process may keep mapped what others have evicted."""


@dataclass
class _Opened:
    """A block that this process has mapped, or holds in memory where the cache does not take it."""

    key: str
    content: memoryview


class CachedShards:
    """Pixel bytes of class records, out of the node's cache. Safe to use from several threads.

    Args:
        storage: of the shards.
        index: of the data set.
        cache: of the node.
        connections: blocks fetched at once.
    """

    def __init__(self, storage: Storage, index: Index, cache: NodeCache, connections: int) -> None:
        self.cache = cache
        self._storage, self._shards = storage, index.shards
        self._blocks = blocks_of(index)
        self._block_at = {
            (block.shard, record.begin): number for number, block in enumerate(self._blocks) for record in block.records
        }
        self._versions: dict[int, str] = {}
        self._open: dict[int, _Opened] = {}
        self._used: set[int] = set()
        self._swept = time.monotonic()
        self._pool = ThreadPoolExecutor(connections, "fetch")

    def close(self) -> None:
        """End the threads that fetch."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def held(self, entries: Sequence[ClassEntry]) -> Iterator[list[memoryview]]:
        """Verified pixel bytes of each entry; missing blocks are fetched, several at once.

        Raises:
            DataError: a shard is missing, or its size or a record's CRC32 is not what the index says.
            StorageError: storage fails for longer than its options allow.
        """
        records = [record_of(entry) for entry in entries]
        numbers = [self._block_at[entry.shard, record.begin] for entry, record in zip(entries, records, strict=True)]
        opened = self._all_opened(set(numbers))
        views = []
        for number, record in zip(numbers, records, strict=True):
            begin = self._blocks[number].begin
            views.append(opened[number].content[record.begin - begin : record.end - begin])
        yield views

    def check(self) -> None:
        """Ask for every shard, so that what is missing is known before anything is computed.

        Raises:
            DataError: a shard is missing, or its size is not what the index says.
        """
        list(self._pool.map(self._version, range(len(self._shards))))

    def _all_opened(self, wanted: set[int]) -> dict[int, _Opened]:
        self._sweep()
        self._used |= wanted
        found = {number: block for number in wanted if (block := self._open.get(number)) is not None}
        absent = sorted(wanted - found.keys())
        if absent:
            found |= zip(absent, self._pool.map(self._opened, absent), strict=True)
        return found

    def _opened(self, number: int) -> _Opened:
        """Map a block. Out of the cache too it is verified, for disks damage what they keep."""
        block = self._blocks[number]
        trouble: Exception | None = None
        for _ in range(FETCHES):
            version = self._version(block.shard)
            key = self._key(block, version)
            try:
                content = self.cache.get(key, block.end - block.begin, lambda: self._fetched(block, version))  # noqa: B023
                self._verify(block, content)
            except MissingError as error:
                raise missing(self._where(block.shard)) from error
            except (DataError, ChangedError) as error:
                self.cache.discard(key)
                self._versions.pop(block.shard, None)
                trouble = error
            else:
                opened = self._open[number] = _Opened(key, content)
                return opened
        assert trouble is not None
        raise trouble

    def _fetched(self, block: Block, version: str) -> bytes:
        content = self._storage.read(self._shards[block.shard].name, block.begin, block.end, version=version)
        self._verify(block, memoryview(content))
        return content

    def _verify(self, block: Block, content: memoryview) -> None:
        for record in block.records:
            if damaged(content[record.begin - block.begin : record.end - block.begin], record):
                raise damage(self._where(block.shard), record)

    def _version(self, number: int) -> str:
        """Of a shard, as first seen."""
        if (known := self._versions.get(number)) is not None:
            return known
        shard = self._shards[number]
        try:
            found = self._storage.stat(shard.name)
        except MissingError as error:
            raise missing(self._where(number)) from error
        if found.size != shard.size:
            raise wrong_size(self._where(number), found.size, shard)
        self._versions[number] = found.version
        return found.version

    def _where(self, number: int) -> str:
        return f"{self._storage.url}/{self._shards[number].name}"

    def _key(self, block: Block, version: str) -> str:
        content = [f"{r.begin}-{r.end}-{r.crc32}" for r in block.records]
        facts = "\n".join([self._storage.url, self._shards[block.shard].name, version, *content])
        return hashlib.sha256(facts.encode()).hexdigest()

    def _sweep(self) -> None:
        """Mark what is in use as such, and let go of what others have evicted: only then its disk space is free."""
        if time.monotonic() - self._swept < SWEEP_S:
            return
        self._swept = time.monotonic()
        used, self._used = self._used, set()
        for number, opened in list(self._open.items()):
            if not (self.cache.touch(opened.key) if number in used else self.cache.has(opened.key)):
                self._open.pop(number, None)
