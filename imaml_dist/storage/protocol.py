"""What the project asks of any storage: whole and ranged reads that never mix versions, writes that are whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ABSENT = "absent"
"""As `only_if` of a write: nothing has this name yet."""


@dataclass(frozen=True)
class Stat:
    """An object: its size in bytes, and a text that changes whenever its content does (an ETag; of a file, its identity)."""

    size: int
    version: str


class Storage(Protocol):
    """A folder, or a bucket and prefix: named objects of bytes. Safe to use from several threads; opened lazily, pickles.

    Names are relative, with `/` between their parts. All methods raise `MissingError` where nothing has that name,
    `ChangedError` where it is no longer the version asked for, and `StorageError` where storage itself fails, having been
    tried again as patiently as its options say.
    """

    url: str
    """Of the folder or prefix, without secrets, for messages."""

    def stat(self, name: str) -> Stat:
        """Size and version of an object."""
        ...

    def read(self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None) -> bytes:
        """Bytes [begin, end) of an object, to its end if None: exactly as many as asked for.

        Args:
            name: of the object.
            begin: first byte, >= 0.
            end: byte after the last.
            version: refuse any other.
        """
        ...

    def stream(
        self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None
    ) -> Iterator[bytes]:
        """As `read`, in pieces of at most 1 MiB; all of one version."""
        ...

    def write(self, name: str, content: bytes | Path, *, only_if: str | None = None) -> str:
        """Write an object: readers see what was there before, or all of the new content.

        Args:
            name: of the object.
            content: bytes, or the path of a file to copy from.
            only_if: `ABSENT`, or the version that is to be replaced; None replaces whatever is there.

        Returns:
            The new version.

        Raises:
            ChangedError: `only_if` is not fulfilled.
        """
        ...

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(name, size) of every object whose name begins with `prefix`, in bytewise order of names."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...
