"""`imaml verify`: check every byte of a data set against its index."""

from __future__ import annotations

from imaml_dist.data.index import read_index
from imaml_dist.data.verify import mismatches
from imaml_dist.errors import DataError
from imaml_dist.storage.protocol import Storage
from pipelines import console


def verify(storage: Storage) -> None:
    """Print all that does not match, as it is found.

    Raises:
        DataError: something does not match.
    """
    index = read_index(storage)
    found = 0
    with console.progress("checking shards") as show:
        for mismatch in mismatches(storage, index, lambda done, total: show(done, total, "bytes")):
            found += 1
            console.err.print(str(mismatch), soft_wrap=True)
    if found:
        raise DataError(
            f"{storage.url}: {found} {'stretch does' if found == 1 else 'stretches of bytes do'} not match the index of {index.name}; copy "
            "the shards again, or prepare the data set again with --fresh"
        )
    classes = sum(map(len, index.splits.values()))
    console.out.print(f"{storage.url}: {len(index.shards)} shards with {classes} classes verify", soft_wrap=True)
