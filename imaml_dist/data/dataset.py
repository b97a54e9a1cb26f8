"""Reading a data set, wherever it lies: every record is verified before its first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from imaml_dist.data.cache import DEFAULT_BUDGET, CacheCounters, NodeCache
from imaml_dist.data.cached import CachedShards
from imaml_dist.data.in_place import ShardsInPlace
from imaml_dist.data.index import ClassEntry, read_index
from imaml_dist.data.records import Images
from imaml_dist.errors import DataError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions


@dataclass(frozen=True)
class CacheOptions:
    """Of the node's cache, which data sets in object storage are read through.

    Attributes:
        folder: None is `$IMAML_CACHE`, or the user's own folder for caches.
        budget: bytes.
    """

    folder: Path | None = None
    budget: int = DEFAULT_BUDGET


class Shards(Protocol):
    """Where the images of class records come from, all of them verified."""

    def gather(self, wanted: Sequence[tuple[ClassEntry, Sequence[int]]]) -> list[Images]:
        """Chosen images of classes, `[k, H, W, C]` each, as stored."""
        ...

    def fetch(self, entries: Sequence[ClassEntry]) -> None:
        """Have classes at hand."""
        ...

    def check(self) -> None:
        """Every shard is there and has its size."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class Dataset:
    """A class-record data set. Safe to read from several threads; not to be pickled: open it where it is used.

    Args:
        url: folder of `index.json`: a path, a `file://` URL or `s3://bucket/prefix`.
        storage: how object storage is reached.
        cache: of the node, for what lies in object storage.

    Raises:
        DataError: there is no index, or a shard is missing or differs from the index in size. The message names the shard.
        StorageError: storage cannot be reached.
    """

    def __init__(self, url: str, storage: StorageOptions | None = None, cache: CacheOptions | None = None) -> None:
        options, kept = storage or StorageOptions(), cache or CacheOptions()
        place = open_storage(url, options)
        self.url = place.url
        self.index = read_index(place)
        self.cached: CacheCounters | None = None
        """Of the node's cache; None where the data set is used where it lies."""
        self._shards: Shards
        if isinstance(place, Folder):
            self._shards = ShardsInPlace(place.path, self.index.shards)
        else:
            node = NodeCache(kept.folder, kept.budget)
            self.cached = node.counters
            self._shards = CachedShards(place, self.index, node, options.connections)
        self._shards.check()

    def classes(self, split: str) -> tuple[ClassEntry, ...]:
        """The classes of a split in canonical order.

        Raises:
            DataError: no such split, or an empty one.
        """
        classes = self.index.splits.get(split, ())
        if not classes:
            raise DataError(f"{self.url}: there is no split {split!r} with classes; it has {sorted(self.index.splits)}")
        return classes

    def images(self, entry: ClassEntry) -> Images:
        """All images of a class, `[n, H, W, C]` uint8 (turned by `rot`)."""
        return self.gather([(entry, range(entry.shape[0]))])[0]

    def gather(self, wanted: Sequence[tuple[ClassEntry, Sequence[int]]]) -> list[Images]:
        """Chosen images of classes, `[k, H, W, C]` uint8 each (turned by `rot`).

        Raises:
            DataError: a record does not match the index; the message names shard, class and bytes.
            StorageError: storage fails for longer than its options allow.
        """
        found = self._shards.gather(wanted)
        return [np.rot90(i, e.rot, axes=(1, 2)) if e.rot else i for i, (e, _) in zip(found, wanted, strict=True)]

    def fetch(self, entries: Sequence[ClassEntry]) -> None:
        """Have classes at hand before their images are asked for."""
        self._shards.fetch(entries)

    def close(self) -> None:
        """End what runs in the background."""
        self._shards.close()
