"""What a node has fetched: files shared by all processes of the node, each whole or absent, the least recently used one first to go."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imaml_dist.errors import StorageError
from imaml_dist.storage.local import exclusive

DEFAULT_BUDGET = 10_000_000_000
"""Bytes."""

FILL_WAIT_S = 60.0
"""How long to wait for another process that is fetching the same thing, before fetching it for oneself."""

ABANDONED_S = 3600.0
"""A file that has been in the writing for this long was left behind by a process that died."""

_STRIPES = 64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_log = logging.getLogger(__name__)


@dataclass
class CacheCounters:
    """Of this process."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0


def default_folder() -> Path:
    """`$IMAML_CACHE`, or `imaml` in the user's folder for such things."""
    if given := os.environ.get("IMAML_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"


class NodeCache:
    """Files by key, within a budget of bytes.

    Files are mapped, not copied, and never change: what is evicted stays readable for those who have it mapped. Where the
    budget or the disk is too small for a file, its content is kept in memory by whoever asked, and by nobody else.

    Args:
        folder: made if missing; several caches of one node that share it share its files.
        budget: bytes of all files together, >= 0.

    Raises:
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path | None = None, budget: int = DEFAULT_BUDGET) -> None:
        self.folder, self.budget = folder or default_folder(), budget
        self.counters = CacheCounters()
        self._counting = threading.Lock()
        self._warned = False
        try:
            self._locks = self.folder / "locks"
            self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"storage.cache: {self.folder} cannot be used ({error.strerror}); give a folder that can be written to"
            ) from error

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> memoryview:
        """The content under a key, fetched if it is not there; by one process of the node at a time.

        Args:
            key: hexadecimal digits, which stand for this content and no other.
            size: of the content in bytes.
            fetch: the content, verified.

        Raises:
            StorageError: the folder cannot be written to. Whatever `fetch` raises.
        """
        if (found := self._mapped(key, size)) is not None:
            return found
        with exclusive(self._locks / f"{int(key[:8], 16) % _STRIPES:02x}", FILL_WAIT_S) as held:
            if (found := self._mapped(key, size)) is not None:
                return found
            self._count(misses=1)
            content = fetch()
            trouble = f"the budget is {self.budget} bytes" if size > self.budget else "another process is slow"
            if held and size <= self.budget:
                trouble = self._kept(key, content)
            if trouble and not self._warned:
                self._warned = True
                _log.warning("storage.cache: %s does not take everything: %s", self.folder, trouble)
            return memoryview(content)

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

    def discard(self, key: str) -> None:
        """Remove what turned out to be damaged."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _mapped(self, key: str, size: int) -> memoryview | None:
        try:
            with open(self._path(key), "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                found = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            return None
        self.touch(key)
        self._count(hits=1)
        return found

    def _kept(self, key: str, content: bytes) -> str:
        """Write a file; why not, if the disk is full."""
        path = self._path(key)
        part = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with exclusive(self._locks / "room", FILL_WAIT_S):
                self._make_room(len(content))
                os.replace(part, path)
        except OSError as error:
            if error.errno not in _FULL:
                raise StorageError(f"storage.cache: {error}; give a folder that can be written to") from error
            return error.strerror or str(error)
        finally:
            part.unlink(missing_ok=True)
        return ""

    def _make_room(self, size: int) -> None:
        files, total = [], 0
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith("."):
                files.append((facts.st_mtime, facts.st_size, path))
                total += facts.st_size
            elif facts.st_mtime < time.time() - ABANDONED_S:
                path.unlink(missing_ok=True)
        for _, freed, path in sorted(files, key=lambda file: file[0]):
            if total + size <= self.budget:
                break
            path.unlink(missing_ok=True)
            self._count(evicted=1)
            total -= freed

    def _count(self, **amounts: int) -> None:
        with self._counting:
            for name, amount in amounts.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)
