"""What a node has fetched: files shared by all processes of the node, each whole or absent, the least recently used one first to go."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imaml_dist.errors import StorageError
from imaml_dist.storage.local import exclusive

DEFAULT_BUDGET = 10_000_000_000
"""Bytes."""

FILL_WAIT_S = 30.0
"""How long to wait for another process that is fetching the same thing, before fetching it for oneself."""

ROOM_WAIT_S = 5.0
"""How long to wait for another process that is making room, which takes it milliseconds."""

_SLOW = "another process holds it up"
_KEY, _PART = re.compile(r"[0-9a-f]{64}\Z"), re.compile(r"\.[0-9a-f]{64}\.part\Z")
_log = logging.getLogger(__name__)


@dataclass
class CacheCounters:
    """Of this process."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0


def default_folder() -> Path:
    """`$IMAML_CACHE`, or `imaml` in the user's folder for such things.

    Raises:
        StorageError: the user has no home.
    """
    if given := os.environ.get("IMAML_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"
    except RuntimeError as error:
        raise StorageError("storage.cache: this user has no home folder; set storage.cache or IMAML_CACHE") from error


class NodeCache:
    """Files by key, within a budget of bytes.

    Files are mapped, not copied, and never change: what is evicted stays readable for those who have it mapped. A file grows under
    another name, by which its writer holds a lock on it, and is renamed when it is whole; so a writer that died is known by its lock.
    Whatever is wrong with the folder costs the cache, not the run: then content is handed out from memory.

    Args:
        folder: made if missing; several caches of one node that share it share its files. Only files of its own below `blocks`
            are touched.
        budget: bytes of all files together, >= 0; those in the writing come on top.
    """

    def __init__(self, folder: Path | None = None, budget: int = DEFAULT_BUDGET) -> None:
        self.folder, self.budget = (folder or default_folder()) / "blocks", budget
        self.counters = CacheCounters()
        self._counting = threading.Lock()
        self._warned = False
        self._no_room_until = 0.0

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> tuple[memoryview, bool]:
        """The content under a key, fetched if it is not there; by one process of the node at a time.

        Args:
            key: 64 hexadecimal digits, which stand for this content and no other.
            size: of the content in bytes, >= 1.
            fetch: the content, verified.

        Returns:
            The content, and whether it is mapped; else it is in memory.

        Raises:
            Whatever `fetch` raises.
        """
        if (found := self._mapped(key, size)) is not None:
            return found, True
        if size > self.budget:
            return self._loose(fetch(), f"its budget is {self.budget} bytes")
        part, trouble = self._locked_part(key)
        try:
            if (found := self._mapped(key, size)) is not None:
                return found, True
            content = fetch()
            if part is not None:
                trouble = self._keep(part, key, content)
        finally:
            if part is not None:
                self._let_go(part, key)
        if not trouble and (found := self._mapped(key, size, hit=False)) is not None:
            self._count(misses=1)
            return found, True
        return self._loose(content, trouble or "a file was removed at once")

    def touch(self, key: str) -> bool:
        """Note that a key is in use; False if it is not there any more."""
        try:
            os.utime(self._path(key))
        except OSError:
            return False
        return True

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        return self._path(key).exists()

    def discard(self, key: str) -> bool:
        """Remove what turned out to be damaged; False if it stays."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _part(self, key: str) -> Path:
        return self.folder / key[:2] / f".{key}.part"

    def _mapped(self, key: str, size: int, *, hit: bool = True) -> memoryview | None:
        try:
            with open(self._path(key), "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                found = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            return None
        self.touch(key)
        self._count(hits=int(hit))
        return found

    def _loose(self, content: bytes, why: str) -> tuple[memoryview, bool]:
        self._count(misses=1)
        if not self._warned:
            self._warned = True
            _log.warning(
                "storage.cache: %s does not keep everything (%s); what it does not is fetched again", self.folder, why
            )
        return memoryview(content), False

    def _locked_part(self, key: str) -> tuple[int | None, str]:
        """A file to write to that is locked by us; or None, and why, which is empty if the key has come meanwhile."""
        path, deadline = self._part(key), time.monotonic() + FILL_WAIT_S
        while True:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                part = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                return None, error.strerror or str(error)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(part, path):  # and not renamed or removed before we had its lock
                    return part, ""
                os.close(part)
            except BlockingIOError:
                os.close(part)
                if self.has(key):
                    return None, ""
                if time.monotonic() > deadline:
                    return None, _SLOW
                time.sleep(0.02)
            except OSError as error:
                os.close(part)
                return None, error.strerror or str(error)

    def _keep(self, part: int, key: str, content: bytes) -> str:
        """Write, sync and rename; why not, if that fails."""
        try:
            os.truncate(part, 0)
            with open(part, "wb", closefd=False) as file:
                file.write(content)
                file.flush()
                os.fsync(part)
            if time.monotonic() < self._no_room_until:
                return _SLOW
            with exclusive(self.folder / "room", ROOM_WAIT_S) as held:
                if not held:
                    self._no_room_until = time.monotonic() + 10 * ROOM_WAIT_S
                    return _SLOW
                self._make_room(len(content))
                os.replace(self._part(key), self._path(key))
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _let_go(self, part: int, key: str) -> None:
        try:
            if _is_at(part, self._part(key)):
                self._part(key).unlink(missing_ok=True)
        except OSError:
            pass  # it will be found without a lock, and removed
        finally:
            os.close(part)

    def _make_room(self, size: int) -> None:
        files, total = [], 0
        for path in self._own_files():
            if path.name.startswith("."):
                _remove_if_abandoned(path)
                continue
            try:
                facts = path.stat()
            except OSError:
                continue
            files.append((facts.st_mtime, facts.st_size, path))
            total += facts.st_size
        for _, freed, path in sorted(files, key=lambda file: file[0]):
            if total + size <= self.budget:
                break
            path.unlink(missing_ok=True)
            self._count(evicted=1)
            total -= freed

    def _own_files(self) -> Iterator[Path]:
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if _KEY.match(path.name) or _PART.match(path.name):
                yield path

    def _count(self, **amounts: int) -> None:
        with self._counting:
            for name, amount in amounts.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _remove_if_abandoned(part: Path) -> None:
    """A writer holds a lock on its file for as long as it lives."""
    try:
        descriptor = os.open(part, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, part):
            part.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(descriptor)
