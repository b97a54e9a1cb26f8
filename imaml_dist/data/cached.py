"""Class records in object storage: fetched in blocks, verified, and kept in the node's cache."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from imaml_dist.data.blocks import Block, blocks_of, record_of
from imaml_dist.data.cache import NodeCache
from imaml_dist.data.index import ClassEntry, Index
from imaml_dist.data.records import Images
from imaml_dist.data.verified import damage, damaged, missing, open_files, wrong_size
from imaml_dist.errors import ChangedError, DataError, MissingError, StorageError
from imaml_dist.storage.protocol import Storage

FETCHES = 3
"""Of a block that arrives damaged or is replaced meanwhile, before that is believed."""

FAILURE_S = 5.0
"""For how long a failure of storage is the answer to what was asked for at the same time."""

SWEEP_S = 1.0
"""How long this process may keep mapped what others have evicted."""


@dataclass
class _Opened:
    """A block that this process has mapped."""

    key: str
    content: memoryview


class CachedShards:
    """Images of class records in object storage, out of the node's cache. Safe to use from several threads.

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
        self._coming: dict[int, Future[memoryview]] = {}
        self._used: set[int] = set()
        self._swept = time.monotonic()
        self._failure, self._failed_at = StorageError(), -FAILURE_S
        self._lock = threading.Lock()
        self._most_open = open_files()
        self._pool = ThreadPoolExecutor(connections, "fetch")

    def gather(self, wanted: Sequence[tuple[ClassEntry, Sequence[int]]]) -> list[Images]:
        """Chosen images, `[k, H, W, C]` each, as stored; missing blocks are fetched, several at once.

        Raises:
            DataError: a shard is missing, or its size or a record's CRC32 is not what the index says.
            StorageError: storage fails for longer than its options allow.
        """
        records = [record_of(entry) for entry, _ in wanted]
        numbers = [self._block_at[entry.shard, r.begin] for (entry, _), r in zip(wanted, records, strict=True)]
        contents = self._contents(set(numbers))
        found = []
        for (entry, chosen), record, number in zip(wanted, records, numbers, strict=True):
            begin = self._blocks[number].begin
            pixels = np.frombuffer(contents[number][record.begin - begin : record.end - begin], dtype=np.uint8)
            found.append(pixels.reshape(entry.shape)[list(chosen)])
        return found

    def fetch(self, entries: Sequence[ClassEntry]) -> None:
        """Have the classes of entries in the cache."""
        self._contents({self._block_at[entry.shard, record_of(entry).begin] for entry in entries})

    def close(self) -> None:
        """End the threads that fetch."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Ask for every shard, so that what is missing is known before anything is computed.

        Raises:
            DataError: a shard is missing, or its size is not what the index says.
        """
        list(self._pool.map(self._version, range(len(self._shards))))

    def _contents(self, wanted: set[int]) -> dict[int, memoryview]:
        """The bytes of blocks by number. Whoever wants what is on its way waits for it, or gets the same error."""
        with self._lock:
            self._sweep()
            self._used |= wanted
            found = {number: self._open[number].content for number in wanted & self._open.keys()}
            for number in found:
                self._open[number] = self._open.pop(number)  # the last one used is the last one in the dictionary
            coming = {n: self._coming.get(n) or self._start(n) for n in sorted(wanted - found.keys())}
        return found | {number: future.result() for number, future in coming.items()}

    def _start(self, number: int) -> Future[memoryview]:
        future = self._coming[number] = self._pool.submit(self._opened, number)
        return future

    def _opened(self, number: int) -> memoryview:
        try:
            if time.monotonic() - self._failed_at < FAILURE_S:
                raise self._failure  # has just been waited for: those in the queue need not all find out for themselves
            try:
                key, content, mapped = self._read(number)
            except StorageError as error:
                self._failure, self._failed_at = error, time.monotonic()
                raise
            if mapped:
                with self._lock:
                    self._open[number] = _Opened(key, content)
                    while len(self._open) > self._most_open:
                        del self._open[next(iter(self._open))]
            return content
        finally:
            with self._lock:
                del self._coming[number]

    def _read(self, number: int) -> tuple[str, memoryview, bool]:
        """Map a block, or read it. Out of the cache too it is verified, for disks damage what they keep."""
        block = self._blocks[number]
        trouble: Exception | None = None
        for _ in range(FETCHES):
            version = self._version(block.shard)
            key = self._key(block, version)
            try:
                content, mapped = self.cache.get(
                    key,
                    block.end - block.begin,
                    lambda: self._fetched(block, version),  # noqa: B023
                )
                if mapped:
                    self._verify(block, content)
            except MissingError as error:
                raise missing(self._where(block.shard)) from error
            except (DataError, ChangedError) as error:
                self._versions.pop(block.shard, None)
                trouble = error
                if not self.cache.discard(key):
                    return key, memoryview(self._fetched(block, self._version(block.shard))), False
            else:
                return key, content, mapped
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
                del self._open[number]
