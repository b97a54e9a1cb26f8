"""A run directory on object storage: every process works in a folder of its own, and what others are to see lies in the run's objects.

    RUN/config.yaml, summary.json, ...     as in a folder, each written whole
    RUN/metrics/                           `metrics.jsonl` in pieces (`remote_metrics`)
    RUN/checkpoints/step-*/                as in a folder
    RUN/.driver.lock, .writer.lock         leases (`storage.lease`): of the command, and of rank 0

Rank 0 brings its metrics there every second from a thread, and before every checkpoint; a meta-step never waits for storage. Its folder
is its keeper's, and outlives it: a new process of rank 0 on the same machine finds all that the old one wrote. One on another
machine begins with what is in storage.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from imaml_dist.errors import CheckpointError, DisagreementError, PeerLostError, StorageError
from imaml_dist.storage.lease import Lease
from imaml_dist.storage.opening import S3, open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import Storage
from imaml_dist.training import checkpoints
from imaml_dist.training.remote_metrics import FOLDER, MetricsReader, MetricsWriter
from imaml_dist.training.run_directory import RunDirectory, State
from imaml_dist.training.run_objects import RunObjects
from imaml_dist.training.workspace import new_workspace

SHARE_S = 1.0
"""Between two looks for what is new, on either side."""

T = TypeVar("T")


def open_run(where: str | Path, options: StorageOptions | None = None, folder: Path | None = None) -> RunDirectory:
    """The run directory behind a path, a `file://` URL or `s3://bucket/prefix`.

    Args:
        where: of the run.
        options: how object storage is reached.
        folder: where to work on a run in object storage; None makes one that goes with this process.

    Raises:
        InputError: another scheme.
    """
    storage = open_storage(where, options)
    if not storage.url.startswith(S3):
        return RunDirectory(Path(storage.url))
    return RemoteRunDirectory(storage, folder or new_workspace())


class RemoteRunDirectory(RunDirectory):
    """A run in object storage; see `RunDirectory`.

    Args:
        storage: of the run.
        folder: where this process works; what it finds there it has left there itself.
    """

    def __init__(self, storage: Storage, folder: Path) -> None:
        super().__init__(folder)
        self._folders.append(folder / FOLDER)
        self._objects = RunObjects(storage, folder)
        self._metrics_writer = MetricsWriter(storage, self.metrics_file)
        self._metrics_reader = MetricsReader(storage, self.metrics_file)
        self._lease: Lease | None = None
        self._sharing = threading.RLock()

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

    @contextmanager
    def driving(self) -> Iterator[bool]:
        """See `RunDirectory`. Waits until it is clear whether a holder of before is still there, half a minute at most."""
        lease = Lease(self._objects.storage, self.driver_lock.name)
        held = lease.acquire() is not None
        try:
            if held:
                self.collect()
            yield held
        finally:
            if held:
                lease.release()

    @contextmanager
    def writing(self, wait: float) -> Iterator[bool]:
        """See `RunDirectory`."""
        label = f"{socket.gethostname()}:{self.path}"
        lease = Lease(self._objects.storage, self.writer_lock.name, label)
        before = lease.acquire(wait)
        if before is None:
            yield False
            return
        with self._sharing:
            self._lease = lease
        try:
            if before == label:  # a process of before ended in the middle of something
                for step in checkpoints.steps(self.checkpoints):
                    self._objects.send(step)
            else:
                self._begin_with_objects()
            with self._every_second(self._share_as_writer):
                yield True
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
    def following(self) -> Iterator[None]:
        """See `RunDirectory`."""
        with self._every_second(self._share_as_follower):
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
        self._objects.push(*files)

    def secure_metrics(self) -> None:
        """See `RunDirectory`."""
        super().secure_metrics()
        with self._sharing:
            self._metrics_writer.push()

    def withdraw_stop(self) -> None:
        """See `RunDirectory`."""
        with suppress(StorageError):  # the next command does
            super().withdraw_stop()

    def failure(self) -> Any:
        """See `RunDirectory`."""
        self._objects.pull(self.failure_file)
        return super().failure()

    def checkpoint_steps(self) -> list[int]:
        """See `RunDirectory`."""
        return self._objects.steps()

    def load_checkpoint(self, step: int) -> State:
        """See `RunDirectory`. A copy that is here already and verifies is as good as what it is a copy of."""
        try:
            return super().load_checkpoint(step)
        except CheckpointError:
            self._objects.bring(step)
        return self._named(lambda: super(RemoteRunDirectory, self).load_checkpoint(step))

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """See `RunDirectory`.

        Raises:
            StorageError: storage fails, or another process writes this run by now.
        """
        super().save_checkpoint(step, tensors, facts)
        if self._lease is not None:
            self._lease.confirm()
        self._objects.send(step)

    def prune_checkpoints(self, keep: int, best: int) -> None:
        """See `RunDirectory`."""
        super().prune_checkpoints(keep, best)
        self._objects.prune(checkpoints.to_keep(self._objects.steps(), keep, best))

    def set_checkpoints_aside_after(self, step: int) -> None:
        """See `RunDirectory`. In storage they are removed."""
        super().set_checkpoints_aside_after(step)
        for later in self._objects.steps():
            if later > step:
                self._objects.drop(later)

    def _entries(self) -> set[str]:
        return self._objects.entries() - {self.driver_lock.name, self.writer_lock.name}

    def _clear(self) -> None:
        self._objects.clear(path.name for path in (*self._files, *self._folders))
        super()._clear()

    def _forget(self, *files: Path) -> None:
        super()._forget(*files)
        self._objects.remove(*files)

    def _begin_with_objects(self) -> None:
        """Have the folder hold what is in storage, and nothing else."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.metrics_file.unlink(missing_ok=True)
        self._metrics_reader = MetricsReader(self._objects.storage, self.metrics_file)
        self._metrics_reader.pull()
        self._objects.pull(self.starts_file, self.evaluation_file)

    def _share_as_writer(self) -> None:
        with self._sharing:
            self._metrics_writer.push()
        if not self.stop_file.exists() and self._objects.has(self.stop_file):
            self.stop_file.touch()

    def _share_as_follower(self) -> None:
        self._objects.push(self.stop_file, self.mlflow_file)
        with self._sharing:
            if self._lease is None:  # where the command trains by itself its folder is what others copy
                self._objects.pull(self.starts_file)
                self._metrics_reader.pull()

    @contextmanager
    def _every_second(self, share: Callable[[], None]) -> Iterator[None]:
        """Do something again and again in a thread of its own, and once more in the end. What storage refuses is tried again then."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.wait(SHARE_S):
                with suppress(StorageError):  # the next time, perhaps
                    share()

        thread = threading.Thread(target=loop, name="sharing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        share()

    def _named(self, load: Callable[[], T]) -> T:
        """Errors are about the objects, not about their copies."""
        try:
            return load()
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(self.path), self.url)) from error
