"""A run directory: where a run keeps everything, and the rules by which an old one is taken up again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from imaml_dist.config.load import flatten, load_config, to_yaml
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import CheckpointError, ConfigError, InputError
from imaml_dist.storage.local import atomic_write
from imaml_dist.tracking.metrics_file import finite
from imaml_dist.training import checkpoints

RESUMABLE = (
    "run.steps",
    "run.max_seconds",
    "run.workers",
    "run.gpus_per_worker",
    "run.backend",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.keep",
    "run.give_up_after",
    "run.profile",
    "run.compare_every",
    "run.deal",
    "run.heartbeat_timeout",
    "run.collective_timeout",
    "validate.every",
    "validate.patience",
    "evaluate",
    "storage",
    "tracking",
)
"""Fields, or whole sections, that a resumed run may change: none of them changes what a meta-step computes.

`run.steps` does under a schedule other than constant, and is refused then."""

PLACES = ("data.url", "warm_start.path", "validate.manifest")
"""Fields that a worker elsewhere has under other values; what lies there is compared by its content."""


class RunDirectory:
    """Paths of a run and the small files beside its checkpoints.

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
        self._files = [file for file in vars(self).values() if isinstance(file, Path) and file.suffix]
        self._files += [self.stop_file]
        self.profile_file = self.profile / "profile.json"
        self.driver_lock = path / ".driver.lock"
        self.writer_lock = path / ".writer.lock"

    def begin(self, config: ExperimentConfig, *, fresh: bool = False) -> None:
        """Make the directory and write the resolved configuration, or check that it may go on under this one.

        Raises:
            ConfigError: the directory holds a run whose configuration differs in a field that may not change.
            InputError: the directory holds something else, and is left alone.
        """
        self.check_usable()
        if fresh:
            self._clear()
        if self.config_file.is_file():
            check_resumable(self.config(), config, self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(self.config_file, to_yaml(config).encode())
        for request in (self.stop_file, self.failure_file):
            request.unlink(missing_ok=True)

    def check_usable(self) -> None:
        """Refuse a folder that belongs to something else.

        Raises:
            InputError: the folder is not empty and holds no run.
        """
        ours = {*self._files, self.checkpoints, self.ray_scratch, self.profile}
        foreign = sorted(entry.name for entry in self._entries() if entry not in ours)
        if self._entries() and (foreign or not self.config_file.is_file()):
            what = f"it holds {foreign[0]!r}" if foreign else "it has no config.yaml"
            raise InputError(f"{self.path} is not empty and holds no run ({what}); choose another --run-dir")

    def _entries(self) -> list[Path]:
        """What the folder holds besides our locks, which are held while it is cleared, and half-written files."""
        if not self.path.is_dir():
            return []
        locks = (self.driver_lock, self.writer_lock)
        return [e for e in self.path.iterdir() if e not in locks and not (e.name[0] == "." and e.suffix == ".part")]

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for folder in (self.checkpoints, self.ray_scratch, self.profile):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)

    def config(self) -> ExperimentConfig:
        """The configuration of the run.

        Raises:
            InputError: the directory holds no run.
        """
        if not self.config_file.is_file():
            raise InputError(f"{self.path} holds no run (no config.yaml); give the --run-dir of a training run")
        return load_config(self.config_file)

    def record_start(self, facts: dict[str, Any]) -> None:
        """Note that the training loop began, afresh or again."""
        whole = not self.starts_file.is_file() or self.starts_file.read_bytes()[-1:] in (b"", b"\n")
        with open(self.starts_file, "a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps({"time": time.time(), **facts}) + "\n")

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
            raise InputError(f"{path} is not JSON ({error}); delete it and run the command again") from error

    def best_checkpoint(self) -> int:
        """Step of the checkpoint with the best validation accuracy.

        The newest one that verifies where the run does not validate, or where the best one is lost.

        Raises:
            CheckpointError: there is none, or none verifies.
        """
        newest = checkpoints.load_newest(self.checkpoints)
        if newest is None:
            raise CheckpointError(f"{self.path} has no checkpoint yet; let the run reach its first one")
        _, facts = newest
        try:
            best = int(facts["best"]["step"])
            checkpoints.load(checkpoints.path_of(self.checkpoints, best))
        except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
            return checkpoints.step_of(facts)
        return best


def fixed_fields(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that a resumed run may not change, in JSON's types, but for places, which have many names."""
    fixed = {field: value for field, value in flatten(config).items() if not _resumable(field) and field not in PLACES}
    found: dict[str, Any] = json.loads(json.dumps(fixed))
    return found


def _resumable(field: str) -> bool:
    return any(field == r or field.startswith(r + ".") for r in RESUMABLE)


def check_resumable(old: ExperimentConfig, new: ExperimentConfig, where: Path) -> None:
    """Compare two configurations field by field.

    Raises:
        ConfigError: they differ in a field that may not change; the message names the first one.
    """
    before, after = flatten(old), flatten(new)
    if old.run.steps != new.run.steps and new.outer.schedule != "constant":
        raise ConfigError(
            f"run.steps: {new.run.steps} given, but the run in {where} was begun with {old.run.steps}, and with outer.schedule "
            f"{new.outer.schedule!r} every step's rate depends on it; restore the old value, or start over with --fresh"
        )
    # A kind first: the fields below it differ because of it.
    for field in sorted(before.keys() | after.keys(), key=lambda name: (not name.endswith(".kind"), name)):
        if before.get(field) != after.get(field) and not _resumable(field):
            raise ConfigError(
                f"{field}: {after.get(field)!r} given, but the run in {where} was begun with {before.get(field)!r}, and a resumed run "
                f"may only change {', '.join(RESUMABLE)}; restore the old value, choose another --run-dir, or start over with --fresh"
            )
