"""Pretend machines: Linux network namespaces that a bridge joins, each with names of its own and its own `/tmp/ray`.

They reach each other and nothing else, and share file system and clock. Needs root and iproute2.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GONE_S = 10.0
"""For killed processes to be gone."""

_serial = itertools.count()


class Machines:
    """Made by `machines`; they are numbered from 0."""

    def __init__(self, count: int, folder: Path) -> None:
        serial = next(_serial)
        mark = f"im{os.getpid()}{'abcdefghijklmnopqrstuvwxyz'[serial % 26]}"  # Linux allows links 15 characters
        self.names = [f"{mark}-{i}" for i in range(count)]
        # A network for each: Ray takes any process on this computer that serves an address for the one it would start there.
        self.addresses = [f"10.{64 + os.getpid() % 128}.{serial % 256}.{10 + i}" for i in range(count)]
        self._bridge = f"{mark}br"
        self._folders = [folder / f"machine-{i}" for i in range(count)]

    def inside(self, i: int) -> list[str]:
        """What to put before a command that is to run on machine i; the command keeps its process id and its signals."""
        own_tmp_ray = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self.names[i],
            "unshare",
            "--mount",
            "sh",
            "-c",
            own_tmp_ray,
            str(self._folders[i]),
        ]

    def processes(self, i: int) -> list[int]:
        """That run on machine i."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[i]).split()]

    def kill(self, i: int) -> None:
        """End all that runs on machine i, whose network still works: the others are told that connections are closed."""
        deadline = time.monotonic() + GONE_S
        while left := self.processes(i):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"cannot be killed: {left}"
            time.sleep(0.02)

    def cut(self, i: int) -> None:
        """Lose, without a word to anybody, whatever machine i sends or is sent."""
        _ip("link", "set", self._link(i), "down")

    def mend(self, i: int) -> None:
        """Undo `cut`."""
        _ip("link", "set", self._link(i), "up")

    def _link(self, i: int) -> str:
        """The bridge's end of the cable."""
        return self.names[i].replace("-", "v")

    def make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        known = "".join(f"{ip} {name}\n" for ip, name in zip(self.addresses, self.names, strict=True))
        for i, (name, ip) in enumerate(zip(self.names, self.addresses, strict=True)):
            files = Path("/etc/netns") / name  # `ip netns exec` puts them in the place of those in /etc
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{ip} {os.uname().nodename}\n{known}")
            (files / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            self._folders[i].mkdir(parents=True)
            _ip("netns", "add", name)
            _ip("link", "add", self._link(i), "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", self._link(i), "master", self._bridge, "up")
            _ip("-n", name, "address", "add", f"{ip}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for i, name in enumerate(self.names):
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
            if (Path("/run/netns") / name).exists():
                self.kill(i)
                _ip("netns", "delete", name)
        with suppress(OSError):
            Path("/etc/netns").rmdir()  # if nobody else has anything in it
        for link in [self._link(i) for i in range(len(self.names))] + [self._bridge]:
            with suppress(RuntimeError):  # Linux deletes links of a deleted namespace on its own, but later
                _ip("link", "delete", link)


@contextmanager
def machines(count: int, folder: Path) -> Iterator[Machines]:
    """So many machines, whose `/tmp/ray` lie in the folder; they and all that runs on them are gone after the block."""
    made = Machines(count, folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def why_not() -> str | None:
    """What keeps this computer from pretending; None if nothing does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found; install iproute2 and util-linux"
    trial = Machines(1, Path("/nonexistent"))
    try:
        _ip("netns", "add", trial.names[0])
        _ip("link", "add", trial._bridge, "type", "bridge")
        subprocess.run(["unshare", "--mount", "true"], check=True)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        return f"this computer does not allow network namespaces ({error})"
    finally:
        trial.remove()
    return None


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
