"""`metrics.jsonl`: one JSON object a line, one line a meta-step; the record that everything else is fed from."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from imaml_dist.errors import InputError
from imaml_dist.storage.local import atomic_write

Record = dict[str, Any]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line; numbers that are not finite become null, so that any JSON reader can read the file.

    Raises:
        OSError: it cannot be written; then nothing of it is.
    """
    line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        whole = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(whole)  # a full disk takes a part
            raise


def make_durable(path: Path) -> None:
    """Wait until all lines are on disk."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """The same JSON value with null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[Record]:
    """All complete lines; a line that a crash left half written is not one. Empty if there is no file.

    Raises:
        InputError: a line in the middle is damaged.
    """
    return list(_records(path.read_bytes(), path)) if path.is_file() else []


def last(path: Path) -> Record | None:
    """The line of the last meta-step on record; None if there is none.

    Raises:
        InputError: see `read`.
    """
    return max(read(path), key=lambda record: int(record["step"]), default=None)


def reached(path: Path) -> int:
    """Meta-steps up to the last on record.

    Raises:
        InputError: see `read`.
    """
    return max((int(record["step"]) + 1 for record in read(path)), default=0)


def rewind(path: Path, step: int) -> None:
    """Drop the lines of meta-steps from `step` on, which will be done, and written, again, and a line that a crash left half written.

    Raises:
        InputError: see `read`.
        OSError: the file cannot be written; then it is as it was.
    """
    kept = "".join(json.dumps(r) + "\n" for r in read(path) if r["step"] < step).encode()
    if path.is_file() and path.read_bytes() != kept:
        atomic_write(path, kept)


class Follower:
    """Reads the lines of a growing file as they come; every step at most once, also when the file is rewound.

    A step that is done again after a rewind is not read again: whoever follows may be unable to take back what it was told
    (MLflow is), and the step's numbers are the same bits but for its times.
    """

    def __init__(self, path: Path, after_step: int = -1) -> None:
        self._path = path
        self._position, self._inode = 0, -1
        self.last_step = after_step

    def poll(self) -> list[Record]:
        """Records that are new since the last call."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return []
        if stat.st_ino != self._inode or stat.st_size < self._position:
            self._position, self._inode = 0, stat.st_ino
        if stat.st_size == self._position:
            return []
        with open(self._path, "rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        new = [r for r in _records(whole, self._path) if r["step"] > self.last_step]
        self._position += len(whole)
        if new:
            self.last_step = new[-1]["step"]
        return new


def _records(data: bytes, path: Path) -> Iterator[Record]:
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} has a line that is no record of a meta-step ({line[:40]!r}...); remove that line"
            ) from error
        yield record
