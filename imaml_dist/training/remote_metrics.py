"""A run's metrics in object storage, where nothing can be added to an object: consecutive pieces of `metrics.jsonl`.

    RUN/metrics/000000000000-5f1c90ab.jsonl     the file's bytes from 0 on
    RUN/metrics/000000262201-90ab5f1c.jsonl     those from 262201 on

Only the last piece is written again, as it grows, and of whole lines only. Where the file was cut back (steps that are done again), the
piece with the cut and all behind it are removed, and a new one begins, whose name was never there before: a reader misses a piece that it
knows, and begins afresh.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imaml_dist.errors import ChangedError, MissingError
from imaml_dist.storage.local import atomic_write
from imaml_dist.storage.protocol import Storage

FOLDER = "metrics"

PIECE_BYTES = 1 << 18
"""Of a piece that is full."""

_NAME = re.compile(rf"{FOLDER}/([0-9]{{12}})-[0-9a-f]{{8}}\.jsonl\Z")


@dataclass(frozen=True)
class _Piece:
    name: str
    begin: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + self.size


def _pieces(storage: Storage) -> list[_Piece]:
    """From the first byte on, as far as one follows the other."""
    found: list[_Piece] = []
    for name, size in storage.names(f"{FOLDER}/"):
        if (match := _NAME.match(name)) and int(match[1]) == _end(found):
            found.append(_Piece(name, int(match[1]), size))
    return found


def _end(pieces: list[_Piece]) -> int:
    return pieces[-1].end if pieces else 0


class MetricsWriter:
    """Brings what is new in a file to storage; there is one writer at a time.

    Args:
        storage: of the run.
        file: `metrics.jsonl`, which may not exist yet.
        confirm: raises if this process may not write any more; asked before anything is removed.
    """

    def __init__(self, storage: Storage, file: Path, confirm: Callable[[], None] = lambda: None) -> None:
        self._storage, self._file, self._confirm = storage, file, confirm
        self._inode = -1
        self._pieces: list[_Piece] | None = None
        """What surely is there; None if that must be found out."""

    def push(self) -> None:
        """Bring all whole lines that are not there yet.

        Raises:
            StorageError: storage fails; the next call goes on.
        """
        try:
            file = open(self._file, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if self._pieces is None or found.st_ino != self._inode or found.st_size < _end(self._pieces):
                self._pieces, self._inode = self._aligned(file.read()), found.st_ino
            pieces = self._pieces
            file.seek(_end(pieces))
            while new := _whole_lines(file.read(PIECE_BYTES)):
                last = pieces.pop() if pieces and pieces[-1].size < PIECE_BYTES else self._next(_end(pieces))
                file.seek(last.begin)
                content = file.read(last.size) + new
                self._pieces = None  # should this fail, who knows what is there
                self._storage.write(last.name, content)
                pieces.append(_Piece(last.name, last.begin, len(content)))
                self._pieces = pieces
                file.seek(_end(pieces))

    def look_again(self) -> None:
        """Have the next push find out what is there."""
        self._pieces = None

    def _next(self, begin: int) -> _Piece:
        return _Piece(f"{FOLDER}/{begin:012d}-{secrets.token_hex(4)}.jsonl", begin, 0)

    def _aligned(self, content: bytes) -> list[_Piece]:
        """Keep the pieces that say what the file says, and remove all others, from behind."""
        kept = []
        for piece in _pieces(self._storage):
            if self._storage.read(piece.name) != content[piece.begin : piece.end]:
                break
            kept.append(piece)
        names = {piece.name for piece in kept}
        others = [name for name, _ in self._storage.names(f"{FOLDER}/") if name not in names]
        if others:
            self._confirm()
        for name in sorted(others, reverse=True):
            self._storage.remove(name)
        return kept


class MetricsReader:
    """Keeps a file like what a writer elsewhere brings to storage.

    Args:
        storage: of the run.
        file: `metrics.jsonl`, written anew.
    """

    def __init__(self, storage: Storage, file: Path) -> None:
        self._storage, self._file = storage, file
        self._seen: dict[str, int] | None = None
        """Bytes of each piece that are in the file; None if that must be found out."""

    def pull(self) -> None:
        """Add what is new to the file; write it anew if what was there before has changed.

        Raises:
            StorageError: storage fails; the next call goes on.
            OSError: the file cannot be written; the next call writes it anew.
        """
        with suppress(MissingError, ChangedError):  # cut back just now: the next call finds out
            self.pull_now()

    def pull_now(self) -> None:
        """As `pull`.

        Raises:
            MissingError, ChangedError: a writer cut it back meanwhile; nothing was done.
        """
        pieces = _pieces(self._storage)
        known = {piece.name: piece.size for piece in pieces}
        have: dict[str, int] = self._seen or {}
        afresh = self._seen is None or any(known.get(name, -1) < size for name, size in have.items())
        news, seen = [], {}
        for piece in pieces:
            begin = 0 if afresh else have.get(piece.name, 0)
            if begin < piece.size:
                news.append(self._storage.read(piece.name, begin, piece.size))
            seen[piece.name] = piece.size
        self._seen = None  # should this fail, who knows what is in the file
        if afresh and (news or self._file.exists()):
            atomic_write(self._file, b"".join(news))
        elif news:
            with open(self._file, "ab") as file:
                file.write(b"".join(news))
        self._seen = seen


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
