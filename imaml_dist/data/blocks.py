"""How a shard is cut for reading over a network: runs of neighbouring class records, fetched, verified and kept together."""

from __future__ import annotations

from dataclasses import dataclass

from imaml_dist.data.index import ClassEntry, Index

BLOCK_BYTES = 4 << 20
"""A run of records ends when it reaches this size: small records share a request, large ones have their own."""


@dataclass(frozen=True)
class Record:
    """The pixel bytes [begin, end) of a class within its shard, and their CRC32."""

    key: str
    begin: int
    end: int
    crc32: int


@dataclass(frozen=True)
class Block:
    """Bytes [begin, end) of a shard, and the records in them; between these lie headers and descriptions, which nobody needs."""

    shard: int
    records: tuple[Record, ...]

    @property
    def begin(self) -> int:
        """First byte."""
        return self.records[0].begin

    @property
    def end(self) -> int:
        """Byte behind the last."""
        return self.records[-1].end


def record_of(entry: ClassEntry) -> Record:
    """Where the pixels of a class lie; classes derived by rotation share them."""
    return Record(entry.key, *entry.pixels, entry.crc32)


def blocks_of(index: Index, block_bytes: int = BLOCK_BYTES) -> list[Block]:
    """All blocks of a data set, in order of shards and bytes: the same for everybody who reads it."""
    places: dict[tuple[int, int], Record] = {}
    for classes in index.splits.values():
        for entry in classes:
            record = record_of(entry)
            places.setdefault((entry.shard, record.begin), record)
    blocks: list[Block] = []
    run: list[Record] = []
    shard = -1
    for (where, _), record in sorted(places.items(), key=lambda item: item[0]):
        if run and (where != shard or run[-1].end - run[0].begin >= block_bytes):
            blocks.append(Block(shard, tuple(run)))
            run = []
        shard = where
        run.append(record)
    return [*blocks, Block(shard, tuple(run))]
