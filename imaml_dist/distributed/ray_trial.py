"""The keeper of one trial: a Ray Tune actor that starts the training command, reports its validations, and ends it in good order.

Why the trial is not trained in the actor itself: what trains is then the very command that a user would type, and a *Ray job of
its own*. When that process ends, however it ends, Ray frees every actor and placement group of the job. A trial that Tune stops
is asked to leave (SIGTERM: checkpoint, workers, placement group, end) and waited for; if Tune kills the actor, the kernel
kills the process, and Ray the job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from imaml_dist.errors import ImamlError, InputError, TrainingError
from imaml_dist.storage.local import exclusive
from imaml_dist.sweeps.search import METRIC, TIME
from imaml_dist.tracking.metrics_file import Follower, Record
from imaml_dist.training.run_directory import RunDirectory

POLL_S = 0.25

LEAVE_S = 60.0
"""For a training command to write its checkpoint and end its workers."""

INTERRUPTED = 130
HOPELESS = (InputError.exit_code, TrainingError.exit_code)
"""Exit codes of failures that would only repeat themselves."""


class TrialCrashedError(ImamlError):
    """The training command ended in a way that may not repeat itself."""


class TrialKeeper(Trainable):  # type: ignore[misc]
    """Keeps one trial until it is trained, or is stopped.

    Its configuration is `{number, run, log, stop, command, cwd, on_ray, environment}`: the trial's number, its run directory, where its
    process's words go, the file that asks all trials to stop, the command and its working directory, whether it starts workers on
    Ray, and what its environment has besides the node's.
    Every step ends with a result `{number, meta_steps, val_accuracy, val_ci95}`; the last one has `done` and an `outcome`:
    `finished`, `interrupted` or `failed` (with `why`). A keeper that follows a crash reports all validations from the first on, of those
    beyond the checkpoint what the run then finds.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the command; it resumes by itself.

        Raises:
            TrialCrashedError: a process of an earlier keeper does not leave.
        """
        self._run = RunDirectory(Path(config["run"]))
        self._run.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self._run.driver_lock, LEAVE_S) as left:  # a killed sweep's processes end a moment after it
            if not left:
                raise TrialCrashedError(f"{self._run.path} is still being trained by an earlier process")
        self._validations: deque[Record] = deque()
        self._follower = Follower(self._run.metrics_file)
        self._earlier_starts = len(self._run.starts())
        self._last: dict[str, Any] = {"number": config["number"]}
        with open(config["log"], "ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                [*config["command"], str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=config["cwd"],
                env=_environment(config["on_ray"]) | config["environment"],
                start_new_session=True,
            )

    def step(self) -> dict[str, Any]:
        """Until the next validation, or the end.

        Raises:
            TrialCrashedError: the command ended, and may not if it is started again.
        """
        while True:
            ended = self._process.poll()
            if self._metrics_hold(ended):
                self._validations += [r for r in self._follower.poll() if r.get(METRIC) is not None]
            if self._validations:
                return self._report(self._validations.popleft())
            if ended is not None:
                return self._end(ended)
            if Path(self.config["stop"]).exists():
                self._leave()
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        """End the command in good order: Tune calls it when the trial is over or has been stopped."""
        self._leave()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run directory is what a trial goes on from."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""

    def _metrics_hold(self, ended: int | None) -> bool:
        """Whether the run has dropped from its metrics what a crash left beyond its checkpoint, or has nothing more to do."""
        return ended == 0 or len(self._run.starts()) > self._earlier_starts

    def _report(self, record: Record) -> dict[str, Any]:
        self._last |= {
            TIME: record["step"] + 1,
            METRIC: record[METRIC],
            "val_ci95": record.get("val_ci95"),
        }
        return dict(self._last)

    def _end(self, code: int) -> dict[str, Any]:
        if code == 0:
            return self._last | {"done": True, "outcome": "finished"}
        if Path(self.config["stop"]).exists():
            return self._last | {"done": True, "outcome": "interrupted"}
        why = _last_words(Path(self.config["log"])) or f"it ended with exit code {code}"
        if code in HOPELESS:
            return self._last | {"done": True, "outcome": "failed", "why": why}
        raise TrialCrashedError(f"signal {-code}" if code < 0 else why)

    def _leave(self) -> None:
        if self._process.poll() is not None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _environment(on_ray: bool) -> dict[str, str]:
    """That of the training command: it imports what this process imports, and connects to the cluster that this actor runs on."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if on_ray:
        found["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        if found.get("CUDA_VISIBLE_DEVICES") == "":  # the actor has no GPU; the command's workers will
            del found["CUDA_VISIBLE_DEVICES"]
    return found


def _last_words(log: Path) -> str:
    """The sentence with which a command of ours ends, if it did."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = [line for line in lines[-20:] if line.startswith("imaml: ")]
    return said[-1].removeprefix("imaml: ") if said else ""
