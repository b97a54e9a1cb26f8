"""Shards that users wrote themselves with plain webdataset: looked through, never unpacked or executed, and given an index."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from imaml_dist.data.index import FILE_NAME, MAX_HEADER, SPLITS, ClassEntry, Index, ShardEntry, read_index
from imaml_dist.data.publishing import check_replaceable, publish, version_of
from imaml_dist.data.shards import crc32_of, shard_entry
from imaml_dist.data.tar import Member, members
from imaml_dist.errors import DataError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.protocol import ABSENT, Storage

MAX_DESCRIPTION, MAX_CLASSES = 16 << 20, 1 << 15
"""Bytes of a class's `json`, and classes of one shard."""

_SHARD = re.compile(r"(train|val|test)-\d{6}\.tar\Z")
_KEY = re.compile(r"[A-Za-z0-9_\-@/]+\Z")
_IMAGES, _DESCRIPTION = "images.npy", "json"


def index_shards(storage: Storage, name: str, progress: Callable[[int, int], None] | None = None) -> tuple[Index, bool]:
    """Read every shard once, and publish the index.

    Args:
        storage: of shards `train-000000.tar`, `val-000000.tar`, ...
        name: of the data set.
        progress: called with (shards read, shards in all).

    Returns:
        The index, and whether it was there already.

    Raises:
        DataError: there is no shard, or one holds something else than classes of images; with shard and byte.
        StorageError: storage fails.
    """
    before = version_of(storage, FILE_NAME)
    try:
        there = read_index(storage)
    except DataError as error:  # none that could be used
        there = None
        if before != ABSENT:
            check_replaceable(storage, "shards", error)
    if there is not None and there.provenance.get("kind") != "shards":
        raise DataError(f"{storage.url} already holds the data set {there.name!r}; choose another --out")
    names = [found for found, _ in storage.names() if _SHARD.match(found)]
    if not names:
        raise DataError(f"{storage.url} holds no shard named as train-000000.tar; write some as docs/preparing.md says")
    versions: dict[str, str] = {}
    shards: list[ShardEntry] = []
    splits: dict[str, list[ClassEntry]] = {split: [] for split in SPLITS if any(n.startswith(split) for n in names)}
    owners: dict[tuple[str, str], str] = {}
    for number, shard in enumerate(names):
        with tempfile.TemporaryDirectory(prefix="imaml-index-") as scratch:
            versions[shard] = storage.stat(shard).version
            path = _fetched(storage, shard, versions[shard], Path(scratch))
            classes = _classes(path, f"shard {storage.url}/{shard}")
            shards.append(shard_entry(path, [(c["offset"] + c["header"], _bytes(c)) for c in classes]))
        split = shard.partition("-")[0]
        for entry in classes:
            if (other := owners.setdefault((split, entry["key"]), shard)) != shard:
                raise DataError(
                    f"{storage.url}: class {entry['key']!r} is in {other} and again in {shard}; write every class once"
                )
            splits[split].append(ClassEntry(shard=number, **entry))
        if progress is not None:
            progress(number + 1, len(names))
    ordered = {split: tuple(sorted(found, key=lambda c: c.key.encode())) for split, found in splits.items()}
    index = Index(name, {"kind": "shards"}, tuple(shards), ordered)
    if there == index:
        return index, True
    publish(storage, index, versions, only_if=before)
    return index, False


def _fetched(storage: Storage, shard: str, version: str, scratch: Path) -> Path:
    """A shard as a local file; a folder's own file is used where it is."""
    if isinstance(storage, Folder):
        return storage.path / shard
    with open(scratch / shard, "wb") as file:
        for piece in storage.stream(shard, version=version):
            file.write(piece)
    return scratch / shard


def _bytes(entry: dict[str, Any]) -> int:
    return int(np.prod(entry["shape"], dtype=np.int64))


def _classes(path: Path, where: str) -> list[dict[str, Any]]:
    """What the index says of each class of a shard, but the shard's number."""
    found: dict[str, dict[str, Any]] = {}
    described: set[str] = set()
    with open(path, "rb") as file:
        for member in members(file, path.stat().st_size, where):
            folder, _, base = member.name.rpartition("/")
            stem, _, field = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if field not in (_IMAGES, _DESCRIPTION) or not stem or not _KEY.match(key):
                raise DataError(
                    f"{where}, byte {member.header}: the member {member.name[:80]!r} is neither <class>.{_IMAGES} nor "
                    f"<class>.{_DESCRIPTION}, with a class of letters, digits, '_', '-', '@' and '/'; write the shard without it"
                )
            seen: Any = found if field == _IMAGES else described
            if key in seen:
                raise DataError(f"{where}, byte {member.header}: a second {member.name!r}; write every class once")
            if len(seen) == MAX_CLASSES:
                raise DataError(f"{where}, byte {member.header}: more than {MAX_CLASSES} classes; write several shards")
            if field == _DESCRIPTION:
                if member.size > MAX_DESCRIPTION:
                    raise DataError(
                        f"{where}, byte {member.header}: a description of {member.size} bytes; write a shorter one"
                    )
                described.add(key)
            else:
                found[key] = {"key": key, "offset": member.offset, **_images(file, member, where)}
    if lonely := sorted(described - found.keys()):
        raise DataError(f"{where}: class {lonely[0]!r} has a description and no {_IMAGES}; write both, or neither")
    if not found:
        raise DataError(f"{where} holds no class; write at least one, or remove the shard")
    return list(found.values())


def _images(file: BinaryIO, member: Member, where: str) -> dict[str, Any]:
    """Header, shape and CRC32 of an npy member."""
    file.seek(member.offset)
    head = io.BytesIO(file.read(min(member.size, MAX_HEADER)))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(head, max_header_size=MAX_HEADER)
    except Exception as error:  # numpy raises what its parser raises
        raise DataError(
            f"{where}, byte {member.offset}: {member.name!r} is not an npy file ({type(error).__name__}); write it with numpy.save"
        ) from error
    header, count = head.tell(), 1
    for side in shape:
        count *= side
    if dtype != np.uint8 or dtype.hasobject or fortran or len(shape) != 4 or min(shape, default=0) < 1:
        raise DataError(
            f"{where}, byte {member.offset}: {member.name!r} is an array of {dtype} {shape}, images are uint8 [n, H, W, C] in C order"
        )
    if header + count != member.size:
        raise DataError(
            f"{where}, byte {member.offset}: {member.name!r} has {member.size} bytes, an array of {shape} has {header + count}"
        )
    begin = member.offset + header
    return {
        "header": header,
        "shape": tuple(int(side) for side in shape),
        "crc32": crc32_of(file, begin, begin + count),
    }
