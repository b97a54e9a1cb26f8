"""A sweep directory: where a sweep keeps everything, and the rules by which an old one is taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from imaml_dist.config.load import flat, read_mapping, to_yaml
from imaml_dist.config.load_sweep import Sweep, sweep_yaml
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ConfigError, InputError
from imaml_dist.storage.local import atomic_write
from imaml_dist.sweeps.ledger import Trial
from imaml_dist.tracking.metrics_file import finite
from imaml_dist.training.run_directory import RunDirectory

CHANGEABLE = ("budget.trials", "max_concurrent", "retries")
"""Fields that a sweep which is taken up again may change: none of them changes a trial."""


class SweepDirectory:
    """Paths of a sweep.

    Args:
        path: created by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sweep_file = path / "sweep.yaml"
        self.ledger_file = path / "ledger.jsonl"
        self.validation_file = path / "validation.jsonl"
        self.test_file = path / "test.jsonl"
        self.outcome_file = path / "sweep.json"
        self.best_file = path / "best.yaml"
        self.report_file = path / "report.html"
        self.mlflow_file = path / "mlflow.json"
        self.stop_file = path / "stop"
        self.trials = path / "trials"
        self.configs = path / "configs"
        self.logs = path / "logs"
        self.ray_scratch = path / "ray"
        self.driver_lock = path / ".driver.lock"
        self._folders = (self.trials, self.configs, self.logs, self.ray_scratch)
        self._files = [f for f in vars(self).values() if isinstance(f, Path) and f.suffix and f != self.driver_lock]
        self._files += [self.stop_file]

    def begin(self, sweep: Sweep, *, fresh: bool = False) -> None:
        """Make the directory and write the sweep down, or check that it may go on under this one.

        Raises:
            ConfigError: the directory holds a sweep that differs in a field that may not change.
            InputError: the directory holds something else, and is left alone.
        """
        self.check_usable()
        if fresh:
            self._clear()
        written = sweep_yaml(sweep)
        if self.sweep_file.is_file():
            self._check_same(sweep)
        for folder in (self.path, self.trials, self.configs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.sweep_file, written.encode())
        self.stop_file.unlink(missing_ok=True)
        shutil.rmtree(self.ray_scratch, ignore_errors=True)

    def check_usable(self) -> None:
        """Refuse a folder that belongs to something else.

        Raises:
            InputError: the folder is not empty and holds no sweep.
        """
        there = list(self.path.iterdir()) if self.path.is_dir() else []
        there = [e for e in there if e != self.driver_lock and not (e.name[0] == "." and e.suffix == ".part")]
        foreign = sorted(entry.name for entry in there if entry not in {*self._files, *self._folders})
        if there and (foreign or not self.sweep_file.is_file()):
            what = f"it holds {foreign[0]!r}" if foreign else "it has no sweep.yaml"
            raise InputError(f"{self.path} is not empty and holds no sweep ({what}); choose another --sweep-dir")

    def run(self, trial: Trial) -> RunDirectory:
        """Where a trial is trained."""
        return RunDirectory(self.trials / trial.name)

    def config_file(self, trial: Trial) -> Path:
        """What a trial is trained with."""
        return self.configs / f"{trial.name}.yaml"

    def log_file(self, trial: Trial) -> Path:
        """What a trial's process says."""
        return self.logs / f"{trial.name}.txt"

    def write_config(self, trial: Trial, config: ExperimentConfig) -> None:
        """Write down what a trial is trained with."""
        atomic_write(self.config_file(trial), to_yaml(config).encode())

    def write_json(self, path: Path, value: Any) -> None:
        """Write one of the sweep's JSON files, whole or not at all; numbers that are not finite become null."""
        atomic_write(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())

    def read_outcome(self) -> dict[str, Any] | None:
        """What an earlier end of the sweep wrote; None if there is nothing that can be read."""
        try:
            found = json.loads(self.outcome_file.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):  # it will be written again
            return None
        return found if isinstance(found, dict) else None

    def _clear(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)

    def _check_same(self, sweep: Sweep) -> None:
        before, after = (
            flat(found) | {"order of space": ", ".join(found["space"])}  # which that of a grid's points follows
            for found in (read_mapping(self.sweep_file), sweep.resolved())
        )
        for field in sorted(before.keys() | after.keys()):
            if before.get(field) != after.get(field) and field not in CHANGEABLE:
                raise ConfigError(
                    f"{field}: {after.get(field)!r} given, but the sweep in {self.path} was begun with {before.get(field)!r}, and a sweep "
                    f"that goes on may only change {', '.join(CHANGEABLE)}; restore the old value, choose another --sweep-dir, or start "
                    "over with --fresh"
                )
