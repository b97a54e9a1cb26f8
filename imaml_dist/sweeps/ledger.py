"""The ledger of a sweep: a JSON line whenever a trial begins, is lost or ends; all that a sweep goes on from.

    {"event": "begun", "trial": 3, "time": ..., "values": {...}}
    {"event": "lost", "trial": 3, "time": ...}
    {"event": "ended", "trial": 3, "time": ..., "status": "finished", "result": {...}, "why": ""}

A line is on disk before anything follows from it. Half a line, left by a crash, is not one, and is dropped by the next writer.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from imaml_dist.errors import InputError
from imaml_dist.storage.local import atomic_write
from imaml_dist.sweeps.drawing import Values
from imaml_dist.tracking.metrics_file import finite

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        accuracy, ci95: of its best validation, and half the width of its interval; None without any.
        best_step: meta-steps before that validation.
        steps, tasks: done in training.
        seconds: of meta-steps.
    """

    accuracy: float | None = None
    ci95: float | None = None
    best_step: int | None = None
    steps: int = 0
    tasks: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One trial as the ledger knows it.

    Attributes:
        number: counted from 0.
        values: of the fields of the space.
        status: `running` until it has ended, also while no sweep runs.
        result: so far known at its end only.
        losses: how often it crashed.
        why: it failed.
        began, ended: seconds since 1970.
    """

    number: int
    values: Values
    status: Status = "running"
    result: Result = Result()
    losses: int = 0
    why: str = ""
    began: float = 0.0
    ended: float | None = None

    @property
    def name(self) -> str:
        """`0003`."""
        return f"{self.number:04d}"


class Ledger:
    """Reads and writes it; by one process at a time, of any of its threads.

    Args:
        path: made with the first line.

    Raises:
        InputError: a line in the middle is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._trials: dict[int, Trial] = {}
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            atomic_write(path, whole)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{path} has a line that tells of no trial ({line[:40]!r}...); remove that line"
                ) from error

    @property
    def trials(self) -> list[Trial]:
        """All so far, by number."""
        with self._lock:
            return [self._trials[number] for number in sorted(self._trials)]

    def trial(self, number: int) -> Trial:
        """One of them."""
        with self._lock:
            return self._trials[number]

    def begin(self, number: int, values: Values) -> Trial:
        """Note that a trial begins."""
        return self._write({"event": "begun", "trial": number, "values": values})

    def lose(self, number: int) -> Trial:
        """Note that a trial crashed and will be started again."""
        return self._write({"event": "lost", "trial": number})

    def end(self, number: int, status: Status, result: Result, why: str = "") -> Trial:
        """Note how a trial ended, for good."""
        return self._write({"event": "ended", "trial": number, "status": status, "result": vars(result), "why": why})

    def _write(self, event: dict[str, Any]) -> Trial:
        with self._lock:
            event = {"time": round(time.time(), 3), **event}
            line = (json.dumps(finite(event), allow_nan=False, default=str) + "\n").encode()
            with open(self._path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(whole)  # a full disk takes a part
                    raise
            return self._take(event)

    def _take(self, event: Mapping[str, Any]) -> Trial:
        number, when = int(event["trial"]), float(event["time"])
        match event["event"]:
            case "begun":
                taken = Trial(number, dict(event["values"]), began=when)
            case "lost":
                before = self._trials[number]
                taken = replace(before, losses=before.losses + 1)
            case "ended":
                result = Result(**event["result"])
                said = {"status": event["status"], "result": result, "why": str(event["why"]), "ended": when}
                taken = replace(self._trials[number], **said)
            case other:
                raise ValueError(f"no event {other!r}")
        self._trials[number] = taken
        return taken
