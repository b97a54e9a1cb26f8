"""Jobs of a Ray cluster through its Jobs API: submitted once however often one tries, followed through lost connections."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shlex import join
from typing import Any, TypeVar

from cluster.jobs import POLL_S, JobHandle, JobState, JobStatus
from cluster.runtime_env import runtime_env, staged
from imaml_dist.errors import ClusterError, InputError, brief

CONNECT_S, ANSWER_S = 5.0, 60.0
"""Ray's own client would wait for ever."""

PATIENCE_S = 60.0
"""How long a cluster that once answered may be away."""

SILENCE_S = 60.0
"""After which a stream of logs is opened anew: a connection can be lost without a word."""

STOP_S = 60
"""Between asking a command to end and ending it. Ray's own 3 seconds are too few for a checkpoint."""

IDENTITY = "imaml_identity"
RUN_DIR = "imaml_run_dir"
"""In a job's metadata."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIGNALLED = 128
_T = TypeVar("_T")


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
    """

    id: str
    command: Sequence[str]
    identity: str
    run_dir: str
    working_dir: Path
    files: Mapping[str, str]


class RayJobs:
    """The jobs of one cluster.

    Args:
        address: of its dashboard, `http://head:8265`.
        environment: the token is in `RAY_AUTH_TOKEN`, or in the file of `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`.

    Raises:
        InputError: the address is none.
        ClusterError: nothing answers there, or it is no Ray dashboard, or it refuses the token.
    """

    def __init__(self, address: str, environment: Mapping[str, str] = os.environ) -> None:
        self.address = _checked_address(address)
        token, self._token_from = _token(environment)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with self._translating(), _named_in_environment(self.address):
            self.client = _client_class()(self.address, headers=headers)

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        found = self.ask(lambda: self.client._do_request("GET", "/api/version").json()["ray_version"])
        return str(found)

    def submit(self, job: Submission, environment: Mapping[str, str] = os.environ) -> tuple[JobHandle, bool]:
        """Run it, unless it runs or has succeeded already. After one that failed or was stopped comes `<id>-2`, and so on.

        Args:
            job: what is to be run.
            environment: of which variables that may travel do.

        Returns:
            The job, and whether it was begun by this call.

        Raises:
            InputError: the id or the folder cannot be used, or the id is that of something else.
            ClusterError: the cluster cannot be reached, or refuses.
        """
        if not _ID.fullmatch(job.id):
            raise InputError(
                f"--id: {job.id!r} given, must be 1 to 100 letters, digits, dots, - and _, a letter or digit first"
            )
        for _ in range(10):  # another submission of the same job may come first, whose job is ours then
            there = {found.submission_id: found for found in self.ask(self.client.list_jobs)}
            names = (job.id if n == 1 else f"{job.id}-{n}" for n in count(1))
            name = next(n for n in names if n not in there or _state(there[n]).status not in _TO_BE_REPEATED)
            if name in there:
                if (there[name].metadata or {}).get(IDENTITY) != job.identity:
                    raise InputError(
                        f"--id: {name} is a job with another configuration or run directory; give another --id, or what that one has"
                    )
                return RayJob(self, name), False
            if self._started(name, job, environment):
                return RayJob(self, name), True
        raise ClusterError(
            f"{self.address} does not take job {job.id}; look for it with imaml jobs list, and try again"
        )

    def _started(self, name: str, job: Submission, environment: Mapping[str, str]) -> bool:
        """Whether it was begun; False says to look again."""
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
                # An answer that is lost says nothing about the request.
                if "already exists" in str(error) or _is_away(error):
                    time.sleep(POLL_S)
                    return False
                raise self._translated(error) from error
        return True

    def job(self, id: str) -> JobHandle:
        """One of them.

        Raises:
            InputError: there is none.
        """
        found = RayJob(self, id)
        found.state()
        return found

    def all(self) -> list[tuple[str, JobState]]:
        """Id and state of every job that was submitted, the oldest first."""
        found = [(d.submission_id, _state(d)) for d in self.ask(self.client.list_jobs) if d.submission_id]
        return sorted(found, key=lambda one: one[1].started or 0.0)

    def ask(self, call: Callable[[], _T]) -> _T:
        """A request that changes nothing, again and again while the cluster is away."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except Exception as error:  # Ray raises whatever its parts raise
                if not _is_away(error) or time.monotonic() > deadline:
                    raise self._translated(error) from error
            time.sleep(POLL_S)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Ray raises whatever its parts raise
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> ClusterError | InputError:
        text, kind = str(error), type(error).__name__
        if kind == "AuthenticationError" and self._token_from is None:
            return ClusterError(
                f"the Ray cluster at {self.address} asks for a token and none is here; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a "
                "file that holds it"
            )
        if kind == "AuthenticationError":
            return ClusterError(
                f"the Ray cluster at {self.address} refuses the token of {self._token_from}; put that cluster's token there"
            )
        if _is_away(error):
            return ClusterError(
                f"nothing answers at {self.address}; check the address (the dashboard's, with port 8265 unless it was changed), or forward "
                "the port"
            )
        if found := re.search(r"Job (\S+) does not exist", text):
            return InputError(
                f"there is no job {found[1]} on {self.address}; imaml jobs list --address {self.address} names those there are"
            )
        if "exceeds the maximum size" in text:
            return InputError(
                "--working-dir: the folder is too large to travel with a job; start imaml where only your code is, or list what stays in "
                ".gitignore"
            )
        if "404" in text or kind in ("JSONDecodeError", "KeyError"):
            return ClusterError(
                f"{self.address} is no dashboard of a Ray cluster; give its address, such as http://head:8265"
            )
        return ClusterError(f"the Ray cluster at {self.address} cannot do that ({brief(error)})")


class RayJob(JobHandle):
    """One job of a Ray cluster; see `JobHandle`."""

    def __init__(self, jobs: RayJobs, id: str) -> None:
        super().__init__(id)
        self._jobs = jobs

    def state(self) -> JobState:
        """See `JobHandle`."""
        return _state(self._jobs.ask(lambda: self._jobs.client.get_job_info(self.id)))

    def logs(self, follow: bool = False) -> Iterator[str]:
        """See `JobHandle`."""
        seen = 0
        while follow and not self.done():
            at = 0
            for text in self._stream():  # always from the beginning
                new = text[max(0, seen - at) :]
                at += len(text)
                seen = max(seen, at)
                if new:
                    yield new
            time.sleep(POLL_S)
        rest = self._jobs.ask(lambda: self._jobs.client.get_job_logs(self.id))[seen:]
        if rest:
            yield rest

    def cancel(self) -> bool:
        """See `JobHandle`."""
        with self._jobs._translating():
            return bool(self._jobs.client.stop_job(self.id))

    def _stream(self) -> Iterator[str]:
        """Its output as it comes, until the stream ends for whatever reason."""
        loop = asyncio.new_event_loop()
        tail = self._jobs.client.tail_job_logs(self.id)
        task: asyncio.Task[str] | None = None
        try:
            while True:
                task = loop.create_task(anext(tail))
                loop.run_until_complete(asyncio.wait({task}, timeout=SILENCE_S))
                if not task.done():
                    return
                try:
                    text = task.result()
                except (StopAsyncIteration, Exception):  # whoever follows asks for the state, which says what it is
                    return
                yield text
        finally:
            if task is not None:
                task.cancel()
                loop.run_until_complete(asyncio.wait({task}))
            with suppress(Exception):
                loop.run_until_complete(tail.aclose())
            loop.close()


_TO_BE_REPEATED = (JobStatus.FAILED, JobStatus.STOPPED)


def _state(details: Any) -> JobState:
    code = details.driver_exit_code
    if code is not None and code < 0:
        code = _SIGNALLED - code  # as shells say it
    return JobState(
        JobStatus(details.status.value),
        code,
        details.message or "",
        (details.metadata or {}).get(RUN_DIR, ""),
        None if details.start_time is None else details.start_time / 1000,
    )


def _checked_address(address: str) -> str:
    if "@" in address:
        raise InputError("--address: credentials do not belong in a URL; take them out, and set RAY_AUTH_TOKEN")
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise InputError(f"--address: {address!r} given, must be that of a Ray dashboard, such as http://head:8265")
    return address.rstrip("/")


def _token(environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The token, and where it comes from; in Ray's own order."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None, str(path)
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise ClusterError(
                f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({brief(error)}); name a file with the token"
            ) from error
        return None, None


@contextmanager
def _named_in_environment(address: str) -> Iterator[None]:
    """Ray lets its variables win over an address that it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _client_class() -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's, which does not wait for ever."""

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **more)

    return Client


def _is_away(error: Exception) -> bool:
    """Whether nobody answered, or only a proxy in front of them."""
    from requests import ConnectionError as Lost
    from requests import Timeout

    gateway = re.search(r"status code 50[234]", str(error)) if isinstance(error, RuntimeError) else None
    return isinstance(error, (Lost, Timeout, ConnectionError)) or gateway is not None
