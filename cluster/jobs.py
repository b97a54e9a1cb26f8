"""A job of a cluster as a future: whether it is done, what came of it, its logs, and its end before its time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from enum import StrEnum
from textwrap import shorten
from typing import Protocol

from imaml_dist.errors import ClusterError

POLL_S = 1.0

STOP_S = 60
"""Between asking a command to end and ending it. Ray's own 3 seconds are too few for a checkpoint."""


class JobStatus(StrEnum):
    """Where a job is; the last three are ends."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


TO_BE_REPEATED = (JobStatus.FAILED, JobStatus.STOPPED)
"""Ends after which the same submission is a new job, which goes on where this one ended."""


@dataclass(frozen=True)
class JobState:
    """What a cluster says about a job.

    Args:
        status: where it is.
        exit_code: of its command, 0 to 255; None before its end, and if the command never ran or was stopped.
        message: the cluster's own words.
        run_dir: where its run is kept; empty for a job that is none of ours.
        started: seconds since 1970; None if not known.
    """

    status: JobStatus
    exit_code: int | None = None
    message: str = ""
    run_dir: str = ""
    started: float | None = None


class JobHandle(ABC):
    """One job; the verbs are those of `concurrent.futures.Future`. Letting go of it does nothing to the job.

    Args:
        id: the cluster's name for it.
    """

    def __init__(self, id: str) -> None:
        self.id = id

    @abstractmethod
    def state(self) -> JobState:
        """What the cluster says about it now.

        Raises:
            InputError: there is no such job.
            ClusterError: the cluster cannot be reached, or refuses.
        """

    @abstractmethod
    def logs(self, follow: bool = False) -> Iterator[str]:
        """Its output in pieces, each character once.

        Args:
            follow: until the job is over, however often the connection is lost; else what there is now.

        Raises:
            ClusterError: the cluster cannot be reached for a minute.
        """

    @abstractmethod
    def cancel(self) -> bool:
        """Ask for its end.

        Returns:
            Whether it was not over yet.
        """

    def status(self) -> JobStatus:
        """Where it is."""
        return self.state().status

    def done(self) -> bool:
        """Whether it is over, in one way or another."""
        return self.status().is_over

    @property
    def exit_code(self) -> int | None:
        """Of its command; None before its end, and if there is none."""
        return self.state().exit_code

    def result(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Args:
            timeout: seconds, at least 0; None waits as long as it takes.

        Returns:
            The exit code of its command, whatever it is.

        Raises:
            TimeoutError: it is not over by then.
            CancelledError: it was stopped.
            ClusterError: its command could not be run, or was lost.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (state := self.state()).status.is_over:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.id} is {state.status} after {timeout} s")
            time.sleep(POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic())))
        if state.status is JobStatus.STOPPED:
            raise CancelledError(f"job {self.id} was stopped")
        if state.exit_code is None:
            why = shorten(state.message, 300, placeholder=" ...") or "no reason was given"
            raise ClusterError(f"job {self.id} ended without its command: {why}; look at its logs, and submit it again")
        return state.exit_code


class Jobs(Protocol):
    """Those of one cluster."""

    @property
    def options(self) -> str:
        """Words of a command line that say which cluster."""
        ...

    @property
    def cancelling(self) -> str:
        """What becomes of a job that is cancelled, as the end of a sentence about it."""
        ...

    def job(self, id: str) -> JobHandle:
        """One of them.

        Raises:
            InputError: there is none of that name.
            ClusterError: the cluster cannot be reached, or refuses.
        """
        ...

    def all(self) -> list[tuple[str, JobState]]:
        """Name and state of each, the oldest first."""
        ...
