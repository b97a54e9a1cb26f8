"""The one pen of a run: metrics line by line, and checkpoints in the background, so that no step waits for a disk.

A meta-step waits for a copy of its state and for nothing else. One thread makes the metrics durable, then writes the
checkpoint: none is ever ahead of its metrics. What cannot be written (a full disk) is owed, and tried again with the next
checkpoint; only what is still owed in the end is an error.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imaml_dist.errors import MissingError, StorageError
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory


@dataclass(frozen=True)
class _Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    best: int


class RunWriter:
    """Writes what a run leaves behind; when it is closed all of it is on disk.

    Args:
        run: the run's directory.
        keep: newest checkpoints to keep, besides the best.

    Attributes:
        failures: attempts to write that failed so far.
    """

    def __init__(self, run: RunDirectory, keep: int) -> None:
        self._run, self._keep = run, keep
        self.failures = 0
        self._reason = ""
        self._lines: list[metrics_file.Record] = []
        self._owed: list[_Checkpoint] = []
        self._new = self._closing = self._behind = False
        self._broken: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="writer", daemon=True)
        self._thread.start()

    def record(self, record: metrics_file.Record) -> None:
        """Add a meta-step's line to the metrics; at once, for others follow them."""
        self._lines.append(record)
        self._write_lines()

    def checkpoint(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], best: int) -> None:
        """Have a checkpoint written; returns at once.

        Where disks are slower than steps checkpoints become fewer: of those that wait, only the newest and the best are written.

        Args:
            step: committed meta-steps.
            tensors: of the state; not to be changed any more.
            facts: of the state.
            best: step of the best checkpoint so far.
        """
        with self._changed:
            self._raise_if_broken()
            self._owed = [one for one in self._owed if one.step == best] + [_Checkpoint(step, tensors, facts, best)]
            self._new = True
            self._changed.notify()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            StorageError: something cannot be written; what was written before is untouched.
        """
        self._write_lines()
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._raise_if_broken()
        if self._owed or self._lines:
            raise self._run.cannot_be_written(self._reason)

    def _loop(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._closing)
                closing, self._new = self._closing, False
                taken, self._owed = self._owed, []
            try:
                failed = self._unwritten(taken)
            except Exception as error:  # a defect of ours: told by the next call, not lost in this thread
                self._broken = error
                return
            with self._changed:
                newer = self._owed
                self._owed = [one for one in failed if not newer or one.step == newer[-1].best] + newer

    def _unwritten(self, taken: list[_Checkpoint]) -> list[_Checkpoint]:
        """Write one after the other up to the first that fails: no newer one may push out an older best one in place of this."""
        for number, one in enumerate(taken):
            if not self._is_written(one):
                return taken[number:]
        return []

    def _is_written(self, one: _Checkpoint) -> bool:
        if self._behind:  # never a checkpoint ahead of its metrics
            return False
        try:
            self._run.secure_metrics()
            self._run.save_checkpoint(one.step, one.tensors, one.facts)
            self._run.prune_checkpoints(self._keep, one.best)
        except (OSError, StorageError, MissingError) as error:  # a bucket may be missing for a moment, too
            self._failed(error)
            return False
        return True

    def _write_lines(self) -> None:
        try:
            while self._lines:
                metrics_file.append(self._run.metrics_file, self._lines[0])
                del self._lines[0]
            self._behind = False
        except OSError as error:
            self._behind = True
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._reason = str(error)

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken
