"""Reading a data set: every shard is verified before its first use, then its pixels are used in place."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imaml_dist.data.index import FILE_NAME, ClassEntry, Index, ShardEntry
from imaml_dist.data.records import Images
from imaml_dist.errors import DataError
from imaml_dist.storage.local import local_path


class Dataset:
    """A verified class-record data set. Safe to read from several threads; not to be pickled: open it where it is used.

    Args:
        url: folder of `index.json`, a path or `file://` URL.

    Raises:
        DataError: the folder or the index is missing, or a shard is missing or differs from the index in size or
            sha256. The message names the shard.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        folder = local_path(url)
        if not folder.is_dir():
            raise DataError(
                f"data.url: there is no folder {folder}; write one with `imaml prepare glyphs --out {folder}` or check the path"
            )
        path = folder / FILE_NAME
        if not path.is_file():
            raise DataError(
                f"data.url: {folder} has no {FILE_NAME}; write the data set with `imaml prepare`, which puts the index last"
            )
        self.index = Index.from_json(path.read_bytes(), str(path))
        self._shards = [_verified(folder / shard.name, shard) for shard in self.index.shards]

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
        """All images of a class, `[n, H, W, C]` uint8, a read-only view into the shard (turned by `rot`)."""
        start = entry.offset + entry.header
        count = int(np.prod(entry.shape))
        pixels = np.frombuffer(self._shards[entry.shard], dtype=np.uint8, count=count, offset=start).reshape(
            entry.shape
        )
        return np.rot90(pixels, entry.rot, axes=(1, 2)) if entry.rot else pixels

    def gather(self, wanted: Sequence[tuple[ClassEntry, Sequence[int]]]) -> list[Images]:
        """Chosen images of classes, `[k, H, W, C]` uint8 each, copies."""
        return [self.images(entry)[list(numbers)] for entry, numbers in wanted]


def _verified(path: Path, shard: ShardEntry) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if size != shard.size:
                raise DataError(
                    f"shard {path} is {size} bytes long, the index says {shard.size} (the bytes from {min(size, shard.size)} on are "
                    f"{'missing' if size < shard.size else 'not ours'}); copy it again or prepare the data set again"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(
            f"shard {path} is missing, the index lists it; copy it again or prepare the data set again"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"shard {path} cannot be read ({error}); mend that or prepare the data set again") from error
    digest = hashlib.sha256(mapped).hexdigest()
    if digest != shard.sha256:
        raise DataError(
            f"shard {path} has sha256 {digest[:12]}, the index says {shard.sha256[:12]}: bytes 0 to {shard.size} contain damage; "
            "copy it again or prepare the data set again"
        )
    return mapped
