"""Real S3 servers on the loopback, each in processes of its own: moto, and a RADOS Gateway with a Ceph behind it.

A server prints its URL once it answers, and ends when its standard input is closed: so it never outlives its tests, even if
those are killed.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
"""Of both servers; moto takes any."""


class Server:
    """A running server.

    Args:
        command: what runs it.

    Raises:
        RuntimeError: it ends before it answers; with what it said.
    """

    def __init__(self, *command: str) -> None:
        self._said = tempfile.TemporaryFile("w+")  # not a pipe: it would fill up, and the server stand still  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env=clean_environment() | environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then end their servers
        )
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            self.process.communicate()
            self._said.seek(0)
            raise RuntimeError(f"{command} does not start:\n{self._said.read()}")

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def close(self) -> None:
        """End it, and wait until all of it is gone."""
        if self.process.returncode is None:
            self.process.communicate(timeout=30)


@contextmanager
def moto_server() -> Iterator[Server]:
    """A moto server, as long as the context lasts."""
    server = Server(sys.executable, __file__)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def rgw_server() -> Iterator[Server]:
    """A RADOS Gateway, as long as the context lasts."""
    script = Path(__file__).parent / "ceph" / "rgw.sh"
    for remaining in (2, 1, 0):
        try:
            server = Server("bash", str(script), str(free_port()), str(free_port()))
            break
        except RuntimeError:  # somebody else may have taken a port meanwhile
            if not remaining:
                raise
    try:
        yield server
    finally:
        server.close()


def rgw_is_installed() -> bool:
    """Whether all programs are here that `rgw_server` runs."""
    programs = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "setpriv")
    return all(shutil.which(program) for program in programs)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(home: Path | None = None, **more: str) -> dict[str, str]:
    """Variables for a client of these servers.

    Args:
        home: a folder instead of the user's own, where there may be settings and credentials.
        more: further variables.
    """
    private = {}
    if home is not None:
        private = {
            "HOME": str(home),
            "AWS_CONFIG_FILE": str(home / "aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "aws-credentials"),
        }
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    return private | keys | {"AWS_EC2_METADATA_DISABLED": "true"} | more


def clean_environment() -> dict[str, str]:
    """The variables of this process but those that a client of S3 heeds."""
    return {k: v for k, v in os.environ.items() if not k.startswith("AWS_") and not k.lower().endswith("_proxy")}


def _serve_moto() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads may be in the middle of answers that nobody waits for


if __name__ == "__main__":
    _serve_moto()
