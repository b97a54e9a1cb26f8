"""Writing a data set: class records -> byte-reproducible WebDataset shards and their index, in any storage.

A sample of a shard is one class: `<key>.images.npy` (uint8 `[n, H, W, C]`) and `<key>.json` (name, sources). Plain
webdataset reads it. Nothing in a shard depends on time, user or order of preparation.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from imaml_dist.data.index import FILE_NAME, ClassEntry, Index, ShardEntry, canonical, read_index
from imaml_dist.data.publishing import publish, version_of
from imaml_dist.data.records import AnyRecord, ClassRecord
from imaml_dist.errors import DataError, MissingError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.protocol import Storage

SHARD_BYTES = 64 << 20
"""A shard is closed when its classes reach this size."""

SKIPPED_NAME = "skipped.txt"
"""Lists images that were left out because they could not be read, a line each; absent where there are none."""

_KEY = re.compile(r"[A-Za-z0-9_\-@/]+\Z")
_SHARD = re.compile(r"(?:train|val|test)-\d{6}-[0-9a-f]{12}\.tar\Z")


@dataclass(frozen=True)
class _Plan:
    """One shard to be written, the n-th of its split; `asked` is a digest of all that is known to decide about its bytes."""

    place: str
    split: str
    records: tuple[AnyRecord, ...]
    asked: str


@dataclass(frozen=True)
class _Finished:
    """A shard that was written: its version, and what the index says of it and (but for shard and turn) of its classes."""

    asked: str
    version: str
    shard: ShardEntry
    classes: list[dict[str, Any]]


def write_dataset(
    place: Storage | Path,
    name: str,
    splits: Mapping[str, Sequence[AnyRecord]],
    provenance: Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    rotations: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Write shards, then `index.json` last, so that what has an index is complete.

    Records are loaded when their turn comes, so no more than one class is held in memory. A preparation that was interrupted
    goes on with the first shard that is missing, if it is asked for the same. A data set that is there stays as it is until
    the new one is whole; then it is replaced.
    Images that records left out are counted in the provenance, and listed beside the index.

    Args:
        place: storage, or a folder; made if missing.
        name: of the data set.
        splits: class records by split.
        provenance: facts about the source (digests, seeds); part of the fingerprint, JSON only.
        settings: what decides about the bytes of a shard beside its records' keys, shapes and digests; the provenance if None.
        rotations: by split, how many quarter turns 1..4 of each class count as classes of their own; default 1.
        shard_bytes: target size of a shard.
        progress: called with (classes written, classes in all).

    Returns:
        The index as written.

    Raises:
        ValueError: an image array of another type or shape, or a key twice, or with other characters than allowed.
        DataError: another preparation has written its index here meanwhile.
        StorageError: storage fails.
    """
    storage: Storage = Folder(place) if isinstance(place, Path) else place
    plans = list(_plans(splits, shard_bytes, provenance if settings is None else settings))
    before, replaced = version_of(storage, FILE_NAME), _shards_of_index(storage)
    total, done = sum(len(plan.records) for plan in plans), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    written: list[_Finished] = []
    for plan in plans:
        finished = _finished(storage, plan)
        if finished is None:
            finished = _write_shard(storage, plan, one_more)
        else:
            done += len(plan.records)
        written.append(finished)
    skipped = [line for shard in written for entry in shard.classes for line in entry.pop("skipped")]
    listed = "".join(f"{line}\n" for line in skipped).encode(errors="backslashreplace")
    digest = hashlib.sha256(listed).hexdigest()
    facts = {"skipped": {"images": len(skipped), "sha256": digest}} if skipped else {}
    if skipped:
        storage.write(SKIPPED_NAME, listed)
    entries = _entries(splits, plans, written, rotations or {})
    index = Index(name, {**provenance, **facts}, tuple(shard.shard for shard in written), entries)
    publish(storage, index, {shard.shard.name: shard.version for shard in written}, only_if=before)
    if not skipped:
        storage.remove(SKIPPED_NAME)
    _tidy(storage, {shard.name for shard in index.shards}, replaced)
    return index


def _shards_of_index(storage: Storage) -> set[str]:
    try:
        return {shard.name for shard in read_index(storage).shards}
    except DataError:  # none that could be used
        return set()


def _plans(splits: Mapping[str, Sequence[AnyRecord]], shard_bytes: int, settings: Mapping[str, Any]) -> Iterator[_Plan]:
    for split, records in splits.items():
        keys = Counter(record.key for record in records)
        if again := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"class key {again[0]!r} is in split {split!r} twice")
        groups: list[list[AnyRecord]] = []
        size = shard_bytes
        for record in sorted(records, key=lambda r: r.key.encode()):
            if size >= shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(record)
            size += math.prod(record.shape)
        for number, group in enumerate(groups):
            wanted = [[record.key, list(record.shape), record.digest] for record in group]
            asked = hashlib.sha256(canonical({"settings": dict(settings), "records": wanted})).hexdigest()
            yield _Plan(f"{split}-{number:06d}", split, tuple(group), asked)


def _entries(
    splits: Iterable[str], plans: Sequence[_Plan], written: Sequence[_Finished], rotations: Mapping[str, int]
) -> dict[str, tuple[ClassEntry, ...]]:
    """Of all classes by split, those derived by rotation as well, in canonical order."""
    entries: dict[str, list[ClassEntry]] = {split: [] for split in splits}
    for number, (plan, finished) in enumerate(zip(plans, written, strict=True)):
        for entry in finished.classes:
            for rot in range(rotations.get(plan.split, 1)):
                key = entry["key"] if rot == 0 else f"{entry['key']}@rot{90 * rot:03d}"
                place = {"key": key, "shape": tuple(entry["shape"]), "shard": number, "rot": rot}
                entries[plan.split].append(ClassEntry(**entry | place))
    return {split: tuple(sorted(found, key=lambda c: c.key.encode())) for split, found in entries.items()}


def _note(place: str) -> str:
    """Where an unfinished data set keeps what the index will say of a finished shard."""
    return f".{place}.json"


def _finished(storage: Storage, plan: _Plan) -> _Finished | None:
    """What an interrupted preparation of the same noted of a shard, if the shard is still the one it wrote."""
    try:
        noted = _Finished(**json.loads(storage.read(_note(plan.place))))
        raw: Any = noted.shard
        shard = ShardEntry(**raw | {"gaps": tuple(raw["gaps"])})
        if noted.asked != plan.asked or noted.version != version_of(storage, shard.name):
            return None
        if any(entry["skipped"] for entry in noted.classes) and not all(r.may_skip for r in plan.records):
            return None
        return replace(noted, shard=shard)
    except (MissingError, ValueError, KeyError, TypeError):
        return None


def _write_shard(storage: Storage, plan: _Plan, one_more: Callable[[], None]) -> _Finished:
    """Write a shard under a name that stands for its content, so that it takes no other's place, and a note of it."""
    with tempfile.TemporaryDirectory(prefix="imaml-prepare-") as scratch:
        path = Path(scratch) / "shard.tar"
        classes = _build(path, plan.records, one_more)
        described = shard_entry(path, [(c["offset"] + c["header"], math.prod(c["shape"])) for c in classes])
        shard = replace(described, name=f"{plan.place}-{described.sha256[:12]}.tar")
        version = storage.write(shard.name, path)
    finished = _Finished(plan.asked, version, shard, classes)
    storage.write(_note(plan.place), canonical(asdict(finished)))
    return finished


def _build(path: Path, records: Sequence[AnyRecord], one_more: Callable[[], None]) -> list[dict[str, Any]]:
    """Write one tar; returns what the index says of each class but shard and rotation."""
    import webdataset

    classes = []
    with (
        open(path, "wb") as file,
        closing(webdataset.TarWriter(file, encoder=False, mtime=0, user="imaml", group="imaml")) as writer,
    ):
        for lazy in records:
            record = lazy.load()
            _check(record)
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(record.images), allow_pickle=False)
            facts = {"name": record.name, "sources": list(record.sources)}
            writer.write(
                {
                    "__key__": record.key,
                    "images.npy": buffer.getvalue(),
                    "json": json.dumps(facts, sort_keys=True).encode(),
                }
            )
            header = buffer.tell() - record.images.nbytes
            crc32 = zlib.crc32(buffer.getbuffer()[header:])
            classes.append(
                {
                    "key": record.key,
                    "header": header,
                    "shape": list(record.shape),
                    "crc32": crc32,
                    "skipped": list(record.skipped),
                }
            )
            one_more()
    with tarfile.open(path, "r:") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    return [entry | {"offset": offsets[f"{entry['key']}.images.npy"]} for entry in classes]


def _check(record: ClassRecord) -> None:
    if not _KEY.match(record.key):
        raise ValueError(f"class key {record.key!r} may hold letters, digits, '_', '-', '@' and '/' only")
    if record.images.dtype != np.uint8 or record.images.ndim != 4:
        raise ValueError(
            f"images of {record.key!r} must be uint8 [n, H, W, C], got {record.images.dtype} {record.images.shape}"
        )


def shard_entry(path: Path, pixels: Sequence[tuple[int, int]]) -> ShardEntry:
    """What the index says of a shard.

    Args:
        path: of the tar.
        pixels: (first byte, bytes) of each class's pixels.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        ordered = sorted(pixels)
        edges = [0, *itertools.chain.from_iterable((begin, begin + length) for begin, length in ordered), size]
        gaps = [crc32_of(file, begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    return ShardEntry(path.name, size, digest, tuple(gaps))


def crc32_of(file: BinaryIO, begin: int, end: int) -> int:
    """CRC32 of bytes [begin, end) of a file, read a piece at a time."""
    file.seek(begin)
    found = 0
    while begin < end and (piece := file.read(min(1 << 20, end - begin))):
        found, begin = zlib.crc32(piece, found), begin + len(piece)
    return found


def _tidy(storage: Storage, listed: set[str], replaced: set[str]) -> None:
    """Remove all notes, the shards of the index that was replaced, and those of preparations that never came to an end."""
    for name in [name for name, _ in storage.names() if _SHARD.match(name) or name in replaced]:
        storage.remove(_note(name.rpartition("-")[0]))
        if name not in listed:
            storage.remove(name)
