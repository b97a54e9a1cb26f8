"""The right to write, held by one process at a time, in storage that has no locks: an object that its holder keeps renewing.

Every write of it, also the one that gives it back, is conditional on the version that was read, so of two only one succeeds. A lease counts
as abandoned when it was not renewed for its `seconds` as measured here: no two clocks are compared. A holder that ended on this very
machine is noticed at once. Requests should be tried for much shorter than `seconds`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from imaml_dist.errors import ChangedError, ImamlError, LeaseLostError, MissingBucketError, MissingError, StorageError
from imaml_dist.storage.protocol import ABSENT, Storage

SECONDS = 30.0

_NEVER = "0" * 32
"""The version of nothing."""

_LONGEST = 4096
"""Bytes of a lease that are read."""


class Lease:
    """Who may write.

    Args:
        storage: where.
        name: of the object.
        label: of the holder, for whoever comes next.
        seconds: without a renewal, until others may take it; renewed three times as often.
    """

    def __init__(self, storage: Storage, name: str, label: str = "", seconds: float = SECONDS) -> None:
        self._storage, self._name, self._seconds = storage, name, seconds
        self._facts: dict[str, Any] = {"holder": secrets.token_hex(8), "label": label, **_process()}
        self._turn, self._version, self._lost, self._renewed = 0, "", False, 0.0
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, wait: float = 0.0, patience: float = 0.0) -> str | None:
        """Become the holder.

        Args:
            wait: seconds to wait for a holder who goes on renewing; one who does not is waited for in any case.
            patience: seconds to wait for storage that fails.

        Returns:
            The label of the holder who was lost without giving it back, "" if there was none; None if somebody holds it.

        Raises:
            StorageError: storage fails, or does not heed conditions, so that it cannot keep two writers apart.
        """
        began = heard = time.monotonic()
        seen, since, renewals = "", began, -1
        while True:
            try:
                with suppress(ChangedError):
                    return self._take(ABSENT, "")
                if (found := self._found()) is not None:
                    version, holder = found
                    if version != seen:
                        seen, since, renewals = version, time.monotonic(), renewals + 1
                    if self._is_free(holder) or time.monotonic() - since >= self._seconds:
                        with suppress(ChangedError):
                            return self._take(version, "" if holder.get("released") else str(holder.get("label", "")))
                    elif renewals > 0 and time.monotonic() - began >= wait:
                        return None
                heard = time.monotonic()
            except StorageError:
                if time.monotonic() - heard >= patience:
                    raise
            time.sleep(self._seconds / 60)

    def check(self) -> None:
        """Make sure that nobody can have taken it, without asking storage.

        Raises:
            LeaseLostError: another process has.
            StorageError: it could not be renewed for so long that another may.
        """
        if self._lost:
            raise self._taken()
        if time.monotonic() - self._renewed >= self._seconds:
            raise StorageError(f"{self._storage.url}: the right to write could not be renewed for {self._seconds:g} s")

    def confirm(self) -> None:
        """Make sure that this process is the holder, now.

        Raises:
            LeaseLostError: it is not any more.
            StorageError: storage fails.
        """
        with self._renewing:
            self._write()

    def leave(self) -> None:
        """Hold it no more, but for one with the same label in this process."""
        self._ended.set()
        self._thread.join()

    def release(self) -> None:
        """Give it back."""
        self.leave()
        self._facts["released"] = True
        with suppress(StorageError, LeaseLostError):  # others find out by themselves
            self.confirm()

    def _take(self, only_if: str, before: str) -> str:
        asked = time.monotonic()
        self._version = self._storage.write(self._name, self._content(), only_if=only_if)
        self._renewed = asked
        for condition, header in ((ABSENT, "If-None-Match"), (_NEVER, "If-Match")):
            with suppress(ChangedError):
                self._storage.write(self._name, b"{}", only_if=condition)
                raise StorageError(
                    f"{self._storage.url}: this server replaces an object that it was told to leave ({header}), so it cannot keep two "
                    "writers apart; keep the run in a folder, or on a server that knows conditional writes"
                )
        self._thread.start()
        return before

    def _write(self) -> None:
        """Renew it, also where the answer to an earlier try was lost."""
        while not self._lost:
            asked = time.monotonic()
            self._turn += 1
            try:
                self._version = self._storage.write(self._name, self._content(), only_if=self._version)
                self._renewed = asked
                return
            except ChangedError:
                found = self._found()
                self._lost = found is None or found[1].get("holder") != self._facts["holder"]
                if found is not None:
                    self._version = found[0]
        raise self._taken()

    def _taken(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self._storage.url} is being written by another process, which took this one for dead; let that one finish, or end it "
            "and run the command again to resume"
        )

    def _is_free(self, holder: dict[str, Any]) -> bool:
        if holder.get("holder") == self._facts["holder"]:  # the answer to our own write was lost
            return True
        left = holder.get("label") == self._facts["label"] != "" and _is_this_process(holder)
        return left or _is_gone(holder) or holder.get("released") is True

    def _found(self) -> tuple[str, dict[str, Any]] | None:
        """Version and content; None if there is nothing any more. What cannot be read is of a holder about whom nothing is known."""
        try:
            stat = self._storage.stat(self._name)
            text = self._storage.read(self._name, 0, min(stat.size, _LONGEST), version=stat.version)
        except MissingBucketError:
            raise
        except (MissingError, ChangedError):
            return None
        with suppress(ValueError, RecursionError):
            if isinstance(read := json.loads(text), dict):
                return stat.version, read
        return stat.version, {}

    def _content(self) -> bytes:
        return json.dumps(self._facts | {"turn": self._turn}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 3) and not self._lost:
            with suppress(ImamlError):  # of storage: the next time, perhaps; of another holder: `check` tells
                self.confirm()


def _process() -> dict[str, Any]:
    """What tells this process from all others, as far as the system says so."""
    with suppress(OSError, ValueError, IndexError):
        return {"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}
    return {"machine": socket.gethostname()}


def _machine() -> str:
    """The machine since it was booted, and the space of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none, or only what its parent has not yet taken note of."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_this_process(holder: dict[str, Any]) -> bool:
    return {key: holder.get(key) for key in ("machine", "pid", "born")} == _process()


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    with suppress(OSError, ValueError, IndexError):
        pid = holder.get("pid")
        if type(pid) is int and holder.get("machine") == _machine():
            return _born(pid) != holder.get("born") and not _is_hidden(pid)
    return False


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's, of whom this system tells nothing."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False
