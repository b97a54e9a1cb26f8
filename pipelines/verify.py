"""`imaml verify`: check every shard and every class record of a data set."""

from __future__ import annotations

import zlib

import numpy as np

from imaml_dist.data.dataset import Dataset
from imaml_dist.errors import DataError
from pipelines import console


def verify(url: str) -> None:
    """Verify sizes and sha256 of all shards, and the CRC32 of all class records.

    Raises:
        DataError: something does not match; the message names it.
    """
    dataset = Dataset(url)  # verifies the shards
    records = [entry for classes in dataset.index.splits.values() for entry in classes]
    with console.progress("checking class records") as show:
        for done, entry in enumerate(records, start=1):
            pixels = np.rot90(dataset.images(entry), -entry.rot, axes=(1, 2)).tobytes()
            if zlib.crc32(pixels) != entry.crc32:
                shard = dataset.index.shards[entry.shard].name
                begin = entry.offset + entry.header
                raise DataError(
                    f"class {entry.key!r} in shard {shard}, bytes {begin} to {begin + len(pixels)}, does not match its checksum; "
                    "prepare the data set again"
                )
            show(done, len(records), "")
    console.out.print(f"{url}: {len(dataset.index.shards)} shards and {len(records)} class records verify")
