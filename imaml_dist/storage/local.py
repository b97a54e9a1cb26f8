"""Files on a local or shared file system: URLs to paths, and writes that are whole or absent."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imaml_dist.errors import InputError


def local_path(url: str | os.PathLike[str]) -> Path:
    """The path behind a plain path or a `file://` URL.

    Raises:
        InputError: another scheme.
    """
    text = os.fspath(url)
    scheme, mark, _ = text.partition("://")
    if scheme == "file" or text.startswith("file:/"):
        return Path(unquote(urlsplit(text).path))
    if mark:
        raise InputError(
            f"{without_secrets(text)}: scheme {scheme!r} is not supported, only paths and file:// URLs are; "
            "copy the data to a local path"
        )
    return Path(text)


def without_secrets(url: str) -> str:
    """The URL without user name and password, for messages and records."""
    return re.sub(r"(?<=//)[^/?#]*@", "", url, count=1)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part: temporary file, fsync, rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def exclusive(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock file; the operating system frees it when the process ends, however it ends.

    Args:
        path: of the lock file, made if missing; or a folder, which then is the lock itself.
        wait: seconds to wait for another holder.

    Yields:
        Whether the lock is held.
    """
    deadline = time.monotonic() + wait
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _locked(descriptor):
            if time.monotonic() >= deadline:
                yield False
                return
            time.sleep(0.02)
        yield True
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
