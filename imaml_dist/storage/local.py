"""Files on a local or shared file system: URLs to paths, and writes that are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes

from imaml_dist.errors import InputError

_FILE_URL = re.compile(r"file:(//(localhost)?)?(?P<path>/[^?#]*)", re.DOTALL)
_TOO_FEW_SLASHES = re.compile(r"(?:[A-Za-z0-9]+:/|(?:s3|gs|https?):)(?!/)")


def local_path(url: str | os.PathLike[str]) -> Path:
    """The path behind a plain path or a `file://` URL.

    Raises:
        InputError: another scheme, or a `file://` URL with anything but a path.
    """
    text = checked_text(url)
    scheme, mark, _ = text.partition("://")
    if scheme == "file" or text.startswith("file:/"):
        found = _FILE_URL.fullmatch(text)
        if found is None or found["path"].startswith("//"):
            raise InputError(
                f"{without_secrets(text)}: not of the form file:///path; give the whole path behind three slashes, "
                "with %3F for ? and %23 for #"
            )
        return Path(checked_text(os.fsdecode(unquote_to_bytes(found["path"]))))
    if mark:
        raise InputError(
            f"{without_secrets(text)}: scheme {scheme!r} is not supported, only paths and file:// URLs are; "
            "copy the data to a local path"
        )
    if _TOO_FEW_SLASHES.match(text):
        raise InputError(f"{text}: URLs have two slashes behind the colon; add them, or write ./{text} for a path")
    return Path(text)


def checked_text(url: str | os.PathLike[str]) -> str:
    """A path or URL that can be opened and printed.

    Raises:
        InputError: it has a NUL in it, or is not UTF-8.
    """
    text = os.fspath(url)
    with suppress(UnicodeEncodeError):
        if b"\0" not in text.encode():
            return text
    raise InputError(f"{without_secrets(text)!r} is no path or URL: it has a NUL in it or is not UTF-8; give another")


def without_secrets(url: str) -> str:
    """The URL without user name and password, and without secrets and signatures in its query, for messages and records."""
    scheme, mark, rest = url.partition("//")
    rest = re.sub(r"[^/?#]*@", "", rest, count=1) if mark and re.match(r"[^/?#]*@", rest) else rest
    # A password may hold a slash; but behind a host, perhaps with a port, an @ is a part of the path.
    if mark and "@" in rest and (_is_database(scheme) or not re.match(r"[^/?#@:]*(:[0-9]+)?[/?#]", rest)):
        rest = rest.rpartition("@")[2]
    return re.sub(
        r"([?&;][^=&;]*(?:pass|pwd|secret|token|sig)[^=&;]*=)[^&;#]*",
        r"\1***",
        scheme + mark + rest,
        flags=re.IGNORECASE,
    )


def _is_database(scheme: str) -> bool:
    return scheme.rstrip(":").partition("+")[0] in ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle")


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

    Raises:
        OSError: the file system cannot lock it.
    """
    deadline = time.monotonic() + wait
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _locked(descriptor, path):
            if time.monotonic() >= deadline:
                yield False
                return
            time.sleep(0.02)
        yield True
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EINTR):
            return False
        raise OSError(error.errno, error.strerror, str(path)) from error  # flock itself names no file
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
