"""Publishing an index: last, and only where nobody else wrote meanwhile, so that what has an index is of one preparation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from imaml_dist.data.index import FILE_NAME, FORMAT, MAX_BYTES, Index
from imaml_dist.errors import ChangedError, DataError, MissingBucketError, MissingError
from imaml_dist.storage.protocol import ABSENT, Storage


def version_of(storage: Storage, name: str) -> str:
    """The version of an object, or `ABSENT`: what a conditional write asks for."""
    try:
        return storage.stat(name).version
    except MissingBucketError:
        raise
    except MissingError:
        return ABSENT


def check_replaceable(storage: Storage, kind: str, unusable: DataError) -> None:
    """An index that cannot be used, being damaged or of another version, is replaced only if it says that it is of this kind.

    Args:
        storage: of the index.
        kind: of the data set that would be written.
        unusable: what is wrong with the index.

    Raises:
        DataError: it may be another data set's, or another program's, whose shards must stay.
        StorageError: storage fails.
    """
    try:
        size = storage.stat(FILE_NAME).size
        raw: Any = json.loads(storage.read(FILE_NAME)) if size <= MAX_BYTES else {}
        mine = raw["format"] == FORMAT and raw["provenance"]["kind"] == kind
    except (ValueError, KeyError, TypeError, RecursionError):
        mine = False
    if not mine:
        raise DataError(
            f"{storage.url} already holds an {FILE_NAME} which cannot be read and does not say that it is of this kind; choose another "
            f"--out, or remove it first ({unusable})"
        ) from unusable


def publish(storage: Storage, index: Index, versions: Mapping[str, str], *, only_if: str) -> None:
    """Write an index, if it is one that can be read again.

    Args:
        storage: of the shards.
        index: to be written.
        versions: of the shards as they were written or read.
        only_if: `ABSENT`, or the version of the index that is replaced.

    Raises:
        DataError: a shard or the index is another preparation's by now; or no reader would accept the index.
        StorageError: storage fails.
    """
    text, where = index.to_json().encode(), f"{storage.url}/{FILE_NAME}"
    if len(text) > MAX_BYTES:
        raise DataError(
            f"{where} would be {len(text)} bytes long, at most {MAX_BYTES} are allowed; make a data set of fewer classes"
        )
    Index.from_json(text, where)
    for name, version in versions.items():
        if version_of(storage, name) != version:
            raise _another(storage, name)
    if version_of(storage, FILE_NAME) != only_if:  # there are servers that do not heed the condition of a write
        raise _another(storage, FILE_NAME)
    try:
        storage.write(FILE_NAME, text, only_if=only_if)
    except ChangedError as error:
        raise _another(storage, FILE_NAME) from error


def _another(storage: Storage, name: str) -> DataError:
    return DataError(
        f"{storage.url}: another preparation has written its {name} here meanwhile; let it finish, or run this one again"
    )
