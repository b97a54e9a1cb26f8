"""A two-way line between a keeper and the process it keeps: JSON, one message a line, over a socket pair."""

from __future__ import annotations

import json
import select
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end. Messages may be sent by several threads, and are received by one."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._begun = b""
        self._sending = threading.Lock()
        self.open = True
        """False once the other end is gone."""

    def send(self, **message: Any) -> None:
        """Tell the other end; nothing happens if it is gone."""
        try:
            with self._sending:
                self._end.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self, wait: float | None = None) -> list[Message]:
        """What has come in, after waiting so many seconds for it at most, or until something comes; empty if the end is gone."""
        if not self.open or not select.select([self._end], [], [], wait)[0]:
            return []
        try:
            data = self._end.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.open = False
            return []
        *lines, self._begun = (self._begun + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Hang up."""
        self.open = False
        self._end.close()
