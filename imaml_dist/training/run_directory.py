"""A run directory: where a run keeps everything."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from imaml_dist.config.load import load_config, to_yaml
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import CheckpointError, InputError, OutsideError, StorageError
from imaml_dist.storage.local import atomic_write, exclusive
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.metrics_file import finite
from imaml_dist.training import checkpoints
from imaml_dist.training.resumable import check_resumable

WRITER_WAIT_S = 60.0
"""How long to wait at least for the workers of a killed command to be gone: Ray ends them, but not at once."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and facts of a checkpoint."""


class RunDirectory:
    """Paths of a run, its checkpoints, and the small files beside them.

    All processes of a run see the same folder; `RemoteRunDirectory` is for those that do not.

    Args:
        path: created by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.evaluation_file = path / "evaluation.json"
        self.report_file = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.starts_file = path / "starts.jsonl"
        self.stop_file = path / "stop"
        self.failure_file = path / "failure.json"
        self.mlflow_file = path / "mlflow.json"
        self.ray_scratch = path / "ray"
        self.profile = path / "profile"
        self._files = [file for name, file in vars(self).items() if name.endswith("_file")]
        self._folders = [self.checkpoints, self.ray_scratch, self.profile]
        self.profile_file = self.profile / "profile.json"
        self.driver_lock = path / ".driver.lock"
        self.writer_lock = path / ".writer.lock"

    @property
    def url(self) -> str:
        """What people know the run by."""
        return str(self.path)

    @property
    def home(self) -> Path:
        """The folder of this machine that has this and other runs."""
        return self.path.resolve().parent

    @property
    def address(self) -> str:
        """By which another process opens it, wherever it works."""
        return str(self.path.resolve())

    def driving(self) -> AbstractContextManager[bool]:
        """Be the one command of the run; yields whether that is so."""
        self.path.mkdir(parents=True, exist_ok=True)
        return exclusive(self.driver_lock)

    def confirm_driving(self) -> None:
        """Make sure that this still is the one command of the run.

        Raises:
            LeaseLostError: another has taken over.
        """

    def writing(self, wait: float) -> AbstractContextManager[bool]:
        """Be the one that writes metrics and checkpoints; yields whether that is so, after `wait` seconds at most."""
        return exclusive(self.writer_lock, wait)

    def barring(self, wait: float) -> AbstractContextManager[bool]:
        """Keep all from writing, as `writing` does, to write nothing oneself."""
        return self.writing(wait)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Have the small files and the metrics be those of the run while it goes on."""
        yield

    def collect(self) -> None:
        """Have the small files and the metrics be those of the run, now that nobody writes them."""

    def share(self, *files: Path) -> None:
        """Make what this process has written to files of the run that of all."""

    def secure_metrics(self) -> None:
        """Wait until all metrics on record survive the loss of this process and machine."""
        metrics_file.make_durable(self.metrics_file)

    def begin(self, config: ExperimentConfig, *, fresh: bool = False) -> None:
        """Make the directory and write the resolved configuration, or check that it may go on under this one.

        Raises:
            ConfigError: the directory holds a run whose configuration differs in a field that may not change.
            InputError: the directory holds something else, and is left alone.
            StorageError: `fresh`, but workers of an earlier start still write into it.
        """
        self.check_usable()
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            with self.barring(max(WRITER_WAIT_S, config.run.collective_timeout)) as barred:
                if not barred:
                    raise self.is_written_to()
                self._clear()
        if self.config_file.is_file():
            check_resumable(self.config(), config, self.url)
        atomic_write(self.config_file, to_yaml(config).encode())
        self.share(self.config_file)
        self._forget(self.stop_file, self.failure_file)

    def check_usable(self) -> None:
        """Refuse a folder that belongs to something else.

        Raises:
            InputError: the folder is not empty and holds no run.
        """
        ours, found = {path.name for path in (*self._files, *self._folders)}, self._entries()
        foreign = sorted(found - ours)
        if found and (foreign or self.config_file.name not in found):
            what = f"it holds {foreign[0]!r}" if foreign else "it has no config.yaml"
            raise InputError(f"{self.url} is not empty and holds no run ({what}); choose another --run-dir")

    def _entries(self) -> set[str]:
        """What the folder holds besides our locks, which are held while it is cleared, and half-written files."""
        if not self.path.is_dir():
            return set()
        locks = (self.driver_lock, self.writer_lock)
        entries = (e for e in self.path.iterdir() if e not in locks and not (e.name[0] == "." and e.suffix == ".part"))
        return {entry.name for entry in entries}

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            if file != self.config_file:
                file.unlink(missing_ok=True)
        self.config_file.unlink(missing_ok=True)  # last: what has none and is not empty is nobody's run

    def _forget(self, *files: Path) -> None:
        for file in files:
            file.unlink(missing_ok=True)

    def config(self) -> ExperimentConfig:
        """The configuration of the run.

        Raises:
            InputError: the directory holds no run.
        """
        if not self.config_file.is_file():
            raise InputError(f"{self.url} holds no run (no config.yaml); give the --run-dir of a training run")
        return load_config(self.config_file)

    def record_start(self, facts: dict[str, Any]) -> None:
        """Note that the training loop began, afresh or again."""
        whole = not self.starts_file.is_file() or self.starts_file.read_bytes()[-1:] in (b"", b"\n")
        with open(self.starts_file, "a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps({"time": time.time(), **facts}) + "\n")
        self.share(self.starts_file)

    def starts(self) -> list[dict[str, Any]]:
        """All starts of the training loop so far, oldest first."""
        if not self.starts_file.is_file():
            return []
        found = []
        for line in self.starts_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # a crash left half a line
                continue
        return found

    def request_stop(self) -> None:
        """Ask the training loop to write a checkpoint after the step it is in and to stop."""
        if self.path.is_dir():
            self.stop_file.touch()

    def write_json(self, path: Path, value: Any) -> None:
        """Write one of the run's JSON files, whole or not at all; numbers that are not finite become null."""
        atomic_write(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())

    def read_json(self, path: Path) -> Any:
        """Read one of the run's JSON files; None if it does not exist.

        Raises:
            InputError: it is not JSON.
        """
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            where = f"{self.url}/{path.relative_to(self.path)}"
            raise InputError(f"{where} is not JSON ({error}); delete it and run the command again") from error

    def withdraw_stop(self) -> None:
        """Ask no more."""
        self._forget(self.stop_file)

    def withdraw_results(self) -> None:
        """Have nothing say that the run is finished, for it goes on."""
        self._forget(self.summary_file, self.evaluation_file, self.report_file)

    def fail(self, kind: str, message: str) -> None:
        """Tell the command which error ends the run.

        Raises:
            OSError, StorageError: it cannot be written.
        """
        self.write_json(self.failure_file, {"type": kind, "message": message})
        self.share(self.failure_file)

    def failure(self) -> Any:
        """What a worker has told; None if nothing."""
        return self.read_json(self.failure_file)

    def cannot_be_written(self, reason: object) -> StorageError:
        """The error for a full disk and its like."""
        return StorageError(
            f"{self.url} cannot be written ({reason}); free space and run the same command again to resume"
        )

    def is_written_to(self) -> StorageError:
        """The error for workers that are not gone."""
        return StorageError(f"{self.url} is still written to by workers of an earlier start; end them and try again")

    def checkpoint_steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first; not verified."""
        return checkpoints.steps(self.checkpoints)

    def newest_step(self) -> int | None:
        """Of the newest finished checkpoint, for a message about something else: None, too, where that cannot be found out."""
        with suppress(OSError, OutsideError):
            return max(self.checkpoint_steps(), default=None)
        return None

    def load_checkpoint(self, step: int) -> State:
        """Verify and read one; see `checkpoints.load`."""
        return checkpoints.load(checkpoints.path_of(self.checkpoints, step))

    def newest_checkpoint(self, rejected: Callable[[str], None] | None = None) -> State | None:
        """The newest that verifies; see `checkpoints.load_newest`."""
        return checkpoints.load_newest(self.checkpoints, rejected)

    def best_checkpoint(self) -> int:
        """Step of the checkpoint with the best validation accuracy.

        The newest one that verifies where the run does not validate, or where the best one is lost.

        Raises:
            CheckpointError: there is none, or none verifies.
        """
        newest = self.newest_checkpoint()
        if newest is None:
            raise CheckpointError(f"{self.url} has no checkpoint yet; let the run reach its first one")
        _, facts = newest
        try:
            best = int(facts["best"]["step"])
            self.load_checkpoint(best)
        except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
            return checkpoints.step_of(facts)
        return best

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write one; see `checkpoints.save`."""
        checkpoints.save(self.checkpoints, step, tensors, facts)

    def prune_checkpoints(self, keep: int, best: int) -> None:
        """Delete all but the newest `keep` and the one of step `best`."""
        checkpoints.prune(self.checkpoints, keep, best)

    def set_checkpoints_aside_after(self, step: int) -> None:
        """Have those of later steps count no more."""
        checkpoints.set_aside_after(self.checkpoints, step)
