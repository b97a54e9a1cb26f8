"""The dashboard of a Ray cluster over HTTP: who may ask, how long to wait for an answer, and what went wrong in one sentence."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from imaml_dist.errors import ClusterError, ImamlError, InputError, brief

CONNECT_S, ANSWER_S = 5.0, 60.0
"""Ray's own client would wait for ever."""

PATIENCE_S = 60.0
"""How long a cluster that once answered may be away."""

POLL_S = 1.0

_T = TypeVar("_T")


class RayDashboard:
    """One cluster's.

    Args:
        address: `http://head:8265`.
        environment: the token is in `RAY_AUTH_TOKEN`, or in the file of `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`.

    Raises:
        InputError: the address is none.
        ClusterError: nothing answers there, or it is no Ray dashboard, or it refuses the token.
    """

    def __init__(self, address: str, environment: Mapping[str, str] = os.environ) -> None:
        self.address = _checked_address(address)
        token, self._token_from = _token(environment)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with _named_in_environment(self.address):
                self.client = _client_class()(self.address, headers=headers)
        except Exception as error:  # Ray raises whatever its parts raise
            raise self.explained(error) from error

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        return str(self.ask(lambda: self.client._do_request("GET", "/api/version").json()["ray_version"]))

    def ask(self, call: Callable[[], _T]) -> _T:
        """A request that may be made twice, again and again while the cluster is away.

        Raises:
            InputError, ClusterError: see `explained`.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except Exception as error:  # Ray raises whatever its parts raise
                if not is_away(error) or time.monotonic() > deadline:
                    raise self.explained(error) from error
            time.sleep(POLL_S)

    def explained(self, error: Exception) -> ImamlError:
        """An error of Ray's client as a sentence of ours."""
        from ray.exceptions import AuthenticationError

        text = str(error)
        if isinstance(error, AuthenticationError) and self._token_from is None:
            return ClusterError(
                f"the Ray cluster at {self.address} asks for a token and none is here; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a "
                "file that holds it"
            )
        if isinstance(error, AuthenticationError):
            return ClusterError(
                f"the Ray cluster at {self.address} refuses the token of {self._token_from}; put that cluster's token there"
            )
        if is_away(error):
            return ClusterError(
                f"nothing answers at {self.address}; check the address (the dashboard's, with port 8265 unless it was changed), or "
                "forward the port"
            )
        if found := re.search(r"Job (\S+) does not exist", text):
            return InputError(
                f"there is no job {found[1]} on {self.address}; imaml jobs list --address {self.address} names those there are"
            )
        if "exceeds the maximum size" in text:
            return InputError(
                "--working-dir: the folder is too large to travel with a job; start imaml where only your code is, or list what stays "
                "in .gitignore"
            )
        if "404" in text or isinstance(error, (KeyError, ValueError)):
            return ClusterError(
                f"{self.address} is no dashboard of a Ray cluster; give its address, such as http://head:8265"
            )
        return ClusterError(f"the Ray cluster at {self.address} cannot do that ({brief(error)})")


def is_away(error: Exception) -> bool:
    """Whether nobody answered, or only a proxy in front of them, or a dashboard whose cluster is not up yet."""
    from requests import ConnectionError as Lost
    from requests import Timeout

    early = isinstance(error, RuntimeError) and re.search(r"status code 50[234]|No available agent", str(error))
    return isinstance(error, (Lost, Timeout, ConnectionError)) or bool(early)


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
    path = Path(named) if named else Path(environment.get("HOME", "/")) / ".ray" / "auth_token"
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

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's, which does not wait for ever."""

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **more)

    return Client
