"""Small data sets that take no time to make: noisy blobs on 28x28, learnable by a tiny network."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from imaml_dist.data.index import Index
from imaml_dist.data.records import ClassRecord
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import StorageError
from imaml_dist.storage.folder import Folder

CLASSES = {"train": 12, "val": 8, "test": 8}


def records(split: str, classes: int, images: int = 20) -> list[ClassRecord]:
    made = []
    for number in range(classes):
        generator = np.random.default_rng([len(split), ord(split[0]), number])
        prototype = np.kron(generator.random((7, 7)) > 0.6, np.ones((4, 4)))
        noise = generator.random((images, 28, 28))
        pixels = np.clip(200 * prototype + 55 * noise, 0, 255).astype(np.uint8)[..., None]
        made.append(ClassRecord(f"{split}/c{number:03d}", pixels, f"class {number}", tuple(map(str, range(images)))))
    return made


class Breaking(Folder):
    """A folder whose k-th write fails."""

    def __init__(self, path, k):
        super().__init__(path)
        self.left = k

    def write(self, name, content, *, only_if=None):
        self.left -= 1
        if self.left == 0:
            raise StorageError("the disk is gone")
        return super().write(name, content, only_if=only_if)


def shard(folder: Path, split: str, number: int = 0) -> Path:
    """A shard of a prepared data set, whose name ends with a part of its sha256."""
    return next(folder.glob(f"{split}-{number:06d}-*.tar"))


def write_blobs(folder: Path, **kwargs) -> Index:
    splits = {split: records(split, count) for split, count in CLASSES.items()}
    return write_dataset(folder, "blobs", splits, {"made": "for tests"}, **kwargs)


@cache
def shard_name(split: str) -> str:
    """Of the only shard that `write_blobs` makes of a split."""
    with tempfile.TemporaryDirectory() as folder:
        write_blobs(Path(folder))
        return shard(Path(folder), split).name
