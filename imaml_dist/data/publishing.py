"""Publishing an index: last, and only where nobody else wrote meanwhile, so that what has an index is of one preparation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from imaml_dist.data.index import FILE_NAME, MAX_BYTES, Index, ShardEntry, read_index
from imaml_dist.errors import ChangedError, DataError, MissingError
from imaml_dist.storage.protocol import ABSENT, Storage


def version_of(storage: Storage, name: str) -> str:
    """The version of an object, or `ABSENT`: what a conditional write asks for."""
    try:
        return storage.stat(name).version
    except MissingError:
        return ABSENT


def another(storage: Storage, name: str) -> ChangedError:
    """The error for an object that somebody else has written since it was first looked at."""
    return ChangedError(
        f"{storage.url}: another preparation has written its {name} here meanwhile; let it finish, or run this one again"
    )


@contextmanager
def alone(storage: Storage, ours: Mapping[str, tuple[str, ShardEntry]]) -> Iterator[None]:
    """Write shards and publish: give way to whoever else does, but never leave an index over shards of two preparations.

    Args:
        storage: of the shards.
        ours: version and description of the shards written so far, by name.

    Raises:
        DataError: somebody else writes here as well.
    """
    try:
        yield
    except ChangedError as error:
        try:
            theirs = read_index(storage).shards
        except DataError:
            theirs = ()
        for shard in theirs:
            version, entry = ours.get(shard.name, ("", shard))
            if entry != shard and version_of(storage, shard.name) == version:
                storage.remove(FILE_NAME)  # published while we replaced this shard
                break
        raise DataError(str(error)) from error


def publish(storage: Storage, index: Index, versions: Mapping[str, str], *, only_if: str = ABSENT) -> None:
    """Write an index, if it is one that can be read again.

    Args:
        storage: of the shards.
        index: to be written.
        versions: of the shards as they were written or read.
        only_if: `ABSENT`, or the version of the index that is replaced.

    Raises:
        ChangedError: a shard or the index is another preparation's by now.
        DataError: no reader would accept the index.
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
            raise another(storage, name)
    try:
        storage.write(FILE_NAME, text, only_if=only_if)
    except ChangedError as error:
        raise another(storage, FILE_NAME) from error
