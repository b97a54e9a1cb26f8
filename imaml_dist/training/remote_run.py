"""A run directory on object storage: every process works in a folder of its own, and what others are to see lies in the run's objects.

    RUN/config.yaml, summary.json, ...     as in a folder, each written whole
    RUN/metrics/                           `metrics.jsonl` in pieces (`remote_metrics`)
    RUN/checkpoints/step-*/                as in a folder
    RUN/.driver.lock, .writer.lock         leases (`storage.lease`): of the command, and of rank 0

Rank 0 brings its metrics there every second from a thread, and before every checkpoint; a meta-step never waits for storage. Its folder
is its keeper's, and outlives it: a new process of rank 0 on the same machine finds all that the old one wrote. One on another
machine begins with what is in storage. Nothing is written without the lease.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from imaml_dist.errors import (
    ChangedError,
    CheckpointError,
    DisagreementError,
    MissingError,
    PeerLostError,
    StorageError,
)
from imaml_dist.storage.lease import Lease
from imaml_dist.storage.opening import S3, open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import Storage
from imaml_dist.training import checkpoints
from imaml_dist.training.remote_metrics import FOLDER, MetricsReader, MetricsWriter
from imaml_dist.training.run_directory import RunDirectory, State
from imaml_dist.training.run_objects import RunObjects
from imaml_dist.training.sharing import SHARE_S, every_second
from imaml_dist.training.workspace import new_workspace

BRISK_S = 5.0
"""For a request about a lease, tries included: one that hangs must not cost the lease."""

_TRIES = 10


def open_run(where: str | Path, options: StorageOptions | None = None, folder: Path | None = None) -> RunDirectory:
    """The run directory behind a path, a `file://` URL or `s3://bucket/prefix`.

    Args:
        where: of the run.
        options: how object storage is reached.
        folder: where to work on a run in object storage; None makes one that goes with this process.

    Raises:
        InputError: another scheme.
    """
    options = options or StorageOptions()
    storage = open_storage(where, options)
    if not storage.url.startswith(S3):
        return RunDirectory(Path(storage.url))
    shortest = {
        name: min(BRISK_S, getattr(options, name)) for name in ("retry_seconds", "connect_timeout", "read_timeout")
    }
    brisk = open_storage(where, replace(options, **shortest))
    return RemoteRunDirectory(storage, brisk, folder or new_workspace(), options.retry_seconds)


class RemoteRunDirectory(RunDirectory):
    """A run in object storage; see `RunDirectory`.

    Args:
        storage: of the run.
        brisk: the same, less patient, for leases.
        folder: where this process works.
        patience: seconds without progress until storage counts as failing.
    """

    def __init__(self, storage: Storage, brisk: Storage, folder: Path, patience: float) -> None:
        super().__init__(folder)
        self._folders.append(folder / FOLDER)
        self._objects, self._brisk, self._patience = RunObjects(storage, folder), brisk, patience
        self._metrics_writer = MetricsWriter(storage, self.metrics_file, self._confirm)
        self._metrics_reader = MetricsReader(storage, self.metrics_file)
        self._lease: Lease | None = None
        self._driving: Lease | None = None
        self._sharing = threading.RLock()
        self._whole = folder / ".whole"
        """Says that the folder has all that was in storage when this keeper's first process began to write."""

    @property
    def url(self) -> str:
        """See `RunDirectory`."""
        return self._objects.storage.url

    @property
    def home(self) -> Path:
        """See `RunDirectory`."""
        return Path("runs").resolve()

    @property
    def address(self) -> str:
        """See `RunDirectory`."""
        return self.url

    def cannot_be_written(self, reason: object) -> StorageError:
        """See `RunDirectory`."""
        return StorageError(
            f"{self.url} cannot be written ({reason}); mend that and run the same command again to resume"
        )

    @contextmanager
    def driving(self) -> Iterator[bool]:
        """See `RunDirectory`. Waits until it is clear whether a holder of before is still there, half a minute at most."""
        lease = Lease(self._brisk, self.driver_lock.name)
        held = lease.acquire(patience=self._patience) is not None
        try:
            if held:
                self._driving = lease
                self.collect()
            yield held
        finally:
            if held:
                lease.release()

    def confirm_driving(self) -> None:
        """See `RunDirectory`."""
        with suppress(StorageError):  # storage is away, for others as well
            if self._driving is not None:
                self._driving.check()

    @contextmanager
    def writing(self, wait: float) -> Iterator[bool]:
        """See `RunDirectory`."""
        label = f"{socket.gethostname()}:{self.path}"
        lease = Lease(self._brisk, self.writer_lock.name, label)
        before = lease.acquire(wait, self._patience)
        if before is None:
            yield False
            return
        with self._sharing:
            self._lease = lease
        try:
            if before == label and self._whole.exists():  # a process of before ended in the middle of something
                for step in checkpoints.steps(self.checkpoints):
                    self._objects.send(step)
            else:
                self._begin_with_objects()
            with every_second(self._share_as_writer):
                yield True
            self._end_with_objects()
        except (PeerLostError, DisagreementError):  # goes on in this folder, in a moment
            lease.leave()
            raise
        except BaseException:
            lease.release()
            raise
        else:
            lease.release()
        finally:
            with self._sharing:
                self._lease, self._metrics_reader = None, MetricsReader(self._objects.storage, self.metrics_file)

    @contextmanager
    def barring(self, wait: float) -> Iterator[bool]:
        """See `RunDirectory`."""
        lease = Lease(self._brisk, self.writer_lock.name)
        held = lease.acquire(wait, self._patience) is not None
        try:
            yield held
        finally:
            if held:
                lease.release()

    @contextmanager
    def following(self) -> Iterator[None]:
        """See `RunDirectory`."""
        with every_second(self._share_as_follower):
            yield

    def collect(self) -> None:
        """See `RunDirectory`."""
        small = [self.config_file, self.starts_file, self.failure_file, self.evaluation_file, self.summary_file]
        if not self.mlflow_file.exists():  # only the command writes it, and may be ahead of what is in storage
            small.append(self.mlflow_file)
        self._objects.pull(*small, self.report_file, self.profile_file)
        with self._sharing:
            self._metrics_reader.pull()

    def share(self, *files: Path) -> None:
        """See `RunDirectory`."""
        if self._lease is not None:
            self._lease.check()
        self._objects.push(*(file for file in files if file != self.mlflow_file or _has_server()))

    def secure_metrics(self) -> None:
        """See `RunDirectory`."""
        super().secure_metrics()
        self._confirm()
        with self._sharing:
            self._metrics_writer.push()

    def withdraw_stop(self) -> None:
        """See `RunDirectory`."""
        self.stop_file.unlink(missing_ok=True)
        if self._objects.has_pushed(self.stop_file):
            with suppress(StorageError):  # the next command does
                self._objects.remove(self.stop_file)

    def failure(self) -> Any:
        """See `RunDirectory`."""
        self._objects.pull(self.failure_file)
        return super().failure()

    def checkpoint_steps(self) -> list[int]:
        """See `RunDirectory`."""
        return self._objects.steps()

    def load_checkpoint(self, step: int) -> State:
        """See `RunDirectory`. A copy that is here already and verifies is as good as what it is a copy of."""
        with suppress(CheckpointError):
            return super().load_checkpoint(step)
        self._objects.bring(step)
        try:
            return super().load_checkpoint(step)
        except CheckpointError as error:  # is about the objects, not about their copies
            raise CheckpointError(str(error).replace(str(self.path), self.url)) from error

    def newest_checkpoint(self, rejected: Callable[[str], None] | None = None) -> State | None:
        """See `RunDirectory`."""
        where = f"{self.url}/{self.checkpoints.name}"
        return checkpoints.newest_that_verifies(self.checkpoint_steps(), self.load_checkpoint, where, rejected)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """See `RunDirectory`.

        Raises:
            LeaseLostError: another process writes this run by now.
            StorageError: storage fails.
        """
        super().save_checkpoint(step, tensors, facts)
        self._confirm()
        self._objects.send(step)

    def prune_checkpoints(self, keep: int, best: int) -> None:
        """See `RunDirectory`."""
        super().prune_checkpoints(keep, best)
        self._objects.prune(lambda steps: checkpoints.to_keep(steps, keep, best))

    def set_checkpoints_aside_after(self, step: int) -> None:
        """See `RunDirectory`. In storage they are removed."""
        super().set_checkpoints_aside_after(step)
        for later in self._objects.steps():
            if later > step:
                self._objects.drop(later)

    def _confirm(self) -> None:
        if self._lease is not None:
            self._lease.confirm()

    def _entries(self) -> set[str]:
        return self._objects.entries() - {self.driver_lock.name, self.writer_lock.name}

    def _clear(self) -> None:
        self._objects.clear((path.name for path in (*self._files, *self._folders)), last=self.config_file.name)
        super()._clear()

    def _forget(self, *files: Path) -> None:
        super()._forget(*files)
        self._objects.remove(*files)

    def _begin_with_objects(self) -> None:
        """Have the folder hold what is in storage, and nothing else."""
        self._whole.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.metrics_file.unlink(missing_ok=True)
        self._metrics_reader = MetricsReader(self._objects.storage, self.metrics_file)
        for remaining in reversed(range(_TRIES)):
            try:
                self._metrics_reader.pull_now()
                break
            except (MissingError, ChangedError) as error:  # somebody who is no more has not quite ended
                if not remaining:
                    raise StorageError(
                        f"{self.url}/{FOLDER} does not come to rest ({error}); run the command again"
                    ) from error
                time.sleep(SHARE_S)
        self._objects.pull(self.starts_file, self.evaluation_file)
        self._whole.touch()

    def _end_with_objects(self) -> None:
        """Whatever somebody who was taken for dead may still have written, the metrics are those of this folder."""
        with self._sharing:
            self._metrics_writer.look_again()
            self._metrics_writer.push()

    def _share_as_writer(self) -> None:
        with self._sharing:
            if self._lease is not None:
                self._lease.check()
            self._metrics_writer.push()
        if not self.stop_file.exists() and self._objects.has(self.stop_file):
            self.stop_file.touch()

    def _share_as_follower(self) -> None:
        self.share(self.stop_file, self.mlflow_file)
        with self._sharing:
            if self._lease is None:  # where the command trains by itself its folder is what others copy
                self._objects.pull(self.starts_file)
                self._metrics_reader.pull()


def _has_server() -> bool:
    """A database in a folder of this machine is none for others."""
    return not os.environ.get("MLFLOW_TRACKING_URI", "sqlite").startswith("sqlite")
