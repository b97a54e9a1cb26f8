"""Jobs of a Ray cluster through its Jobs API: submitted once however often one tries, followed through lost connections."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shlex import join
from typing import Any

from cluster.jobs import POLL_S, STOP_S, TO_BE_REPEATED, JobHandle, JobState, JobStatus
from cluster.ray_dashboard import RayDashboard, is_away
from cluster.runtime_env import runtime_env, staged
from imaml_dist.errors import ClusterError, InputError

SILENCE_S = 60.0
"""After which a stream of logs is opened anew: a connection can be lost without a word."""

IDENTITY = "imaml_identity"
RUN_DIR = "imaml_run_dir"
"""In a job's metadata."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIGNALLED = 128
_TRIES = 10


@dataclass(frozen=True)
class Submission:
    """What is to be run.

    Args:
        id: of the job.
        command: with its arguments, as the head of the cluster finds it.
        identity: of what it does: two submissions of one id must agree in it.
        run_dir: where the run is kept.
        working_dir: travels, and is the current folder of the command and of all workers.
        files: name -> text, put beside what is in that folder.

    Raises:
        InputError: the id or the folder cannot be used.
    """

    id: str
    command: Sequence[str]
    identity: str
    run_dir: str
    working_dir: Path
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise InputError(
                f"--id: {self.id!r} given, must be 1 to 100 letters, digits, dots, - and _, a letter or digit first"
            )
        if not self.working_dir.is_dir():
            raise InputError(f"--working-dir: {self.working_dir} given, which is no folder; name one that exists")


class RayJobs(RayDashboard):
    """The jobs of one cluster; see `RayDashboard` and `Jobs`."""

    @property
    def options(self) -> str:
        """See `Jobs`."""
        return f"--address {self.address}"

    @property
    def cancelling(self) -> str:
        """See `Jobs`."""
        return "is asked to stop, and writes a checkpoint first"

    def submit(self, job: Submission, environment: Mapping[str, str] = os.environ) -> tuple[JobHandle, bool]:
        """Run it, unless it runs or has succeeded already. After one that failed or was stopped comes `<id>-2`, and so on.

        Args:
            job: what is to be run.
            environment: of which variables that may travel do.

        Returns:
            The job, and whether it was begun by this call.

        Raises:
            InputError: the id is that of something else, or the folder is too large.
            ClusterError: the cluster cannot be reached, or refuses.
        """
        for _ in range(_TRIES):  # another submission of the same job may come first, whose job is ours then
            there = {found.submission_id: found for found in self.ask(self.client.list_jobs)}
            names = (job.id if n == 1 else f"{job.id}-{n}" for n in count(1))
            name = next(n for n in names if n not in there or _state(there[n]).status not in TO_BE_REPEATED)
            if name not in there:
                if self._begun(name, job, environment):
                    return RayJob(self, name), True
                time.sleep(POLL_S)
            elif (there[name].metadata or {}).get(IDENTITY) == job.identity:
                return RayJob(self, name), False
            else:
                raise InputError(
                    f"--id: {name} is a job with another configuration or run directory; give another --id, or what that one has"
                )
        raise ClusterError(f"{self.address} does not take job {job.id}; look whether it is there, and try again")

    def job(self, id: str) -> JobHandle:
        """See `Jobs`."""
        found = RayJob(self, id)
        found.state()
        return found

    def all(self) -> list[tuple[str, JobState]]:
        """See `Jobs`."""
        found = [(d.submission_id, _state(d)) for d in self.ask(self.client.list_jobs) if d.submission_id]
        return sorted(found, key=lambda one: one[1].started or 0.0)

    def _begun(self, name: str, job: Submission, environment: Mapping[str, str]) -> bool:
        """Whether this request began it. False says to look again: the answer to a lost request may have been yes."""
        with staged(job.working_dir, job.files) as folder:
            described = runtime_env(folder, environment)
            described["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] = str(STOP_S)
            try:
                self.client.submit_job(
                    entrypoint=join(job.command),
                    submission_id=name,
                    runtime_env=described,
                    metadata={IDENTITY: job.identity, RUN_DIR: job.run_dir},
                )
            except Exception as error:  # Ray raises whatever its parts raise
                if is_away(error) or "already exists" in str(error):
                    return False
                raise self.explained(error) from error
        return True


class RayJob(JobHandle):
    """One job of a Ray cluster; see `JobHandle`."""

    def __init__(self, jobs: RayJobs, id: str) -> None:
        super().__init__(id)
        self._jobs, self._client = jobs, jobs.client

    def state(self) -> JobState:
        """See `JobHandle`."""
        return _state(self._jobs.ask(lambda: self._client.get_job_info(self.id)))

    def logs(self, follow: bool = False) -> Iterator[str]:
        """See `JobHandle`."""
        seen = 0
        while follow and not self.done():
            at = 0
            for text in self._stream():
                new = text[max(0, seen - at) :]
                at += len(text)
                seen = max(seen, at)
                if new:
                    yield new
            time.sleep(POLL_S)
        if rest := self._jobs.ask(lambda: self._client.get_job_logs(self.id))[seen:]:
            yield rest

    def cancel(self) -> bool:
        """See `JobHandle`."""
        return bool(self._jobs.ask(lambda: self._client.stop_job(self.id)))

    def _stream(self) -> Iterator[str]:
        """Its output from the beginning, until the stream ends, for whatever reason."""
        loop = asyncio.new_event_loop()
        tail = self._client.tail_job_logs(self.id)
        task: asyncio.Future[str] | None = None
        try:
            while True:
                task = asyncio.ensure_future(anext(tail), loop=loop)
                loop.run_until_complete(asyncio.wait({task}, timeout=SILENCE_S))
                if not task.done():
                    return
                try:
                    text = task.result()
                except Exception:  # whoever follows asks for the state next, and hears what is wrong
                    return
                yield text
        finally:
            if task is not None:
                task.cancel()
                loop.run_until_complete(asyncio.wait({task}))
            with suppress(Exception):
                loop.run_until_complete(tail.aclose())
            loop.close()


def _state(details: Any) -> JobState:
    code = details.driver_exit_code
    return JobState(
        JobStatus(details.status.value),
        _SIGNALLED - code if code is not None and code < 0 else code,  # as shells say that a signal ended it
        details.message or "",
        (details.metadata or {}).get(RUN_DIR, ""),
        None if details.start_time is None else details.start_time / 1000,
    )
