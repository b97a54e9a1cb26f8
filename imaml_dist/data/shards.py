"""Writing a data set: class records -> byte-reproducible WebDataset shards and their index.

A sample of a shard is one class: `<key>.images.npy` (uint8 `[n, H, W, C]`) and `<key>.json` (name, sources). Plain
webdataset reads it. Nothing in a shard depends on time, user or order of preparation.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imaml_dist.data.index import FILE_NAME, ClassEntry, Index, ShardEntry
from imaml_dist.data.records import ClassRecord
from imaml_dist.storage.local import atomic_write

SHARD_BYTES = 64 << 20
"""A shard is closed when its classes reach this size."""

_KEY = re.compile(r"[A-Za-z0-9_\-@/]+\Z")


def write_dataset(
    folder: Path,
    name: str,
    splits: Mapping[str, Sequence[ClassRecord]],
    provenance: Mapping[str, Any],
    *,
    rotations: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Write shards, then `index.json` last, so that a folder with an index is complete.

    Args:
        folder: created if missing.
        name: of the data set.
        splits: class records by split.
        provenance: facts about the source (digests, seeds); part of the fingerprint, JSON only.
        rotations: by split, how many quarter turns 1..4 of each class count as classes of their own; default 1.
        shard_bytes: target size of a shard.
        progress: called with (classes written, classes in all).

    Returns:
        The index as written.

    Raises:
        ValueError: an image array of another type or shape, or a key with other characters than allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(len(records) for records in splits.values()), 0
    shards: list[ShardEntry] = []
    entries: dict[str, list[ClassEntry]] = {}
    for split, records in splits.items():
        turns = (rotations or {}).get(split, 1)
        entries[split] = []
        for group in _groups(sorted(records, key=lambda r: r.key.encode()), shard_bytes):
            file_name = f"{split}-{len([s for s in shards if s.name.startswith(split + '-')]):06d}.tar"
            places = _write_shard(folder / file_name, group)
            shards.append(_shard_entry(folder / file_name))
            for record, (offset, header) in zip(group, places, strict=True):
                count, height, width, channels = record.images.shape
                for rot in range(turns):
                    entries[split].append(
                        ClassEntry(
                            key=record.key if rot == 0 else f"{record.key}@rot{90 * rot:03d}",
                            shard=len(shards) - 1,
                            offset=offset,
                            header=header,
                            shape=(count, height, width, channels),
                            crc32=zlib.crc32(record.images.tobytes()),
                            rot=rot,
                        )
                    )
                done += 1
                if progress is not None:
                    progress(done, total)
    index = Index(
        name=name,
        provenance=dict(provenance),
        shards=tuple(shards),
        splits={split: tuple(sorted(classes, key=lambda c: c.key.encode())) for split, classes in entries.items()},
    )
    atomic_write(folder / FILE_NAME, index.to_json().encode())
    return index


def _groups(records: Sequence[ClassRecord], shard_bytes: int) -> list[list[ClassRecord]]:
    groups: list[list[ClassRecord]] = []
    size = shard_bytes
    for record in records:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += record.images.nbytes
    return groups


def _write_shard(path: Path, records: Sequence[ClassRecord]) -> list[tuple[int, int]]:
    """Write one tar atomically; returns (member offset, npy header length) per record."""
    import webdataset

    part = path.with_name(f".{path.name}.part")
    headers = []
    with open(part, "wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0, user="imaml", group="imaml")
        for record in records:
            if not _KEY.match(record.key):
                raise ValueError(f"class key {record.key!r} may hold letters, digits, '_', '-', '@' and '/' only")
            if record.images.dtype != np.uint8 or record.images.ndim != 4:
                raise ValueError(
                    f"images of {record.key!r} must be uint8 [n, H, W, C], got {record.images.dtype} {record.images.shape}"
                )
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(record.images), allow_pickle=False)
            headers.append(buffer.tell() - record.images.nbytes)
            facts = {"name": record.name, "sources": list(record.sources)}
            writer.write(
                {
                    "__key__": record.key,
                    "images.npy": buffer.getvalue(),
                    "json": json.dumps(facts, sort_keys=True).encode(),
                }
            )
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(part, "r:") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    os.replace(part, path)
    return [(offsets[f"{r.key}.images.npy"], header) for r, header in zip(records, headers, strict=True)]


def _shard_entry(path: Path) -> ShardEntry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(name=path.name, size=path.stat().st_size, sha256=digest)
