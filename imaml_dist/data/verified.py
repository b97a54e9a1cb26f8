"""What does not match the index, in one sentence each: which shard, which class, which bytes."""

from __future__ import annotations

import resource
import zlib

from imaml_dist.data.blocks import Record
from imaml_dist.data.index import ShardEntry
from imaml_dist.errors import DataError

_CURE = "copy it again, or prepare the data set again with --fresh"


def open_files() -> int:
    """How many files a data set may keep open: a quarter of what the process may, 64 at least."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, min(soft, 1 << 20) // 4)


def damaged(pixels: memoryview, record: Record) -> bool:
    """Whether bytes are not those that the index was made of."""
    return len(pixels) != record.end - record.begin or zlib.crc32(pixels) != record.crc32


def damage(shard: str, record: Record) -> DataError:
    """The error for a record that does not match its CRC32."""
    return DataError(
        f"shard {shard}: bytes {record.begin} to {record.end}, the images of class {record.key!r}, do not match the index "
        f"(CRC32 {record.crc32:08x}); {_CURE}"
    )


def wrong_size(where: str, size: int, shard: ShardEntry) -> DataError:
    """The error for a shard that is too short or too long."""
    return DataError(
        f"shard {where} is {size} bytes long, the index says {shard.size} (the bytes from {min(size, shard.size)} on are "
        f"{'missing' if size < shard.size else 'not ours'}); {_CURE}"
    )


def missing(where: str) -> DataError:
    """The error for a shard that is not there."""
    return DataError(f"shard {where} is missing, the index lists it; {_CURE}")
