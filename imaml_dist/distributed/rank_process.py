"""The process of a rank as its keeper sees it: started, told what to do, listened to, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from imaml_dist.distributed.channel import Channel, Message

POLL_S = 0.1

COMING_S = 5.0
"""For all ranks to come to a new group, beyond the limit of a collective: a busy machine takes its time."""

_START = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Before the imports, which take seconds, it asks the kernel (PR_SET_PDEATHSIG) to end it with its keeper: it must not stay
behind when it is stopped and cannot notice."""


class RankProcess:
    """A process of `rank.py`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-c", _START, "imaml_dist.distributed.rank", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is not for it
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._channel = Channel(ours)
        self._heard = self._moved = time.monotonic()
        self._chunk = 0
        self.ready = False
        self.joining = self.member = False
        """Of a group: about to be, and until it says how that ended."""
        self.step = -1
        """The last that it told."""

    @property
    def pid(self) -> int:
        """Of the operating system."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, or is stopped."""
        return self._channel.open and self._process.poll() is None

    @property
    def silent(self) -> float:
        """Seconds since its last word."""
        return time.monotonic() - self._heard

    @property
    def stuck(self) -> float:
        """Seconds since it began to compute a chunk; 0 while it computes none."""
        return time.monotonic() - self._moved if self._chunk else 0.0

    def join(self, **order: Any) -> None:
        """Have it train in a group."""
        self._chunk = 0
        self.joining = self.member = True
        self._channel.send(do="join", **order)

    def save(self) -> None:
        """Have it ask for a checkpoint."""
        self._channel.send(do="save")

    def hear(self, wait: float) -> list[Message]:
        """What it says that is not only a sign of life, after so many seconds at most."""
        news = []
        for message in self._channel.receive(wait):
            self._heard = time.monotonic()
            match message["said"]:
                case "beat":
                    self.step = message["step"]
                    if message["chunk"] != self._chunk:
                        self._chunk, self._moved = message["chunk"], self._heard
                case "ready":
                    self.ready = True
                case "joined":
                    self.joining = False
                case _:
                    self.joining = self.member = False
                    news.append(message)
        return news

    def wait_until_ready(self, timeout: float) -> bool:
        """Whether it comes up in time."""
        deadline = time.monotonic() + timeout
        while not self.ready and self.alive and time.monotonic() < deadline:
            self.hear(POLL_S)
        return self.ready and self.alive

    def kill(self) -> None:
        """End it, whatever it does, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def how_it_ended(self) -> str:
        """In words; waits for it."""
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
