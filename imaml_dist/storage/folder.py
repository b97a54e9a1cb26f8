"""A folder of a local or shared file system as storage."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from imaml_dist.errors import ChangedError, InputError, MissingError, StorageError
from imaml_dist.storage.local import exclusive, local_path, sync_folder
from imaml_dist.storage.protocol import ABSENT, Stat

PIECE = 1 << 20
"""Bytes read at once."""

_NO_LOCK = (errno.EBADF, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
"""What locking says where it cannot be done."""


class Folder:
    """`Storage` in a folder, which is made by the first write.

    Args:
        url: a path or `file://` URL.

    Raises:
        InputError: another scheme.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.path = local_path(url)
        self.url = str(self.path)

    def stat(self, name: str) -> Stat:
        """See `Storage`."""
        try:
            found = os.stat(self.path / name)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError
            return _stat(found)
        except OSError as error:
            raise self._translated(name, error) from error

    def read(self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None) -> bytes:
        """See `Storage`."""
        return b"".join(self.stream(name, begin, end, version=version))

    def stream(
        self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None
    ) -> Iterator[bytes]:
        """See `Storage`."""
        try:
            with open(self.path / name, "rb") as file:
                found = _stat(os.fstat(file.fileno()))
                if version not in (None, found.version):
                    raise ChangedError(f"{self.path / name} was changed since it was first looked at; read it again")
                end = found.size if end is None else end
                file.seek(begin)
                while begin < end:
                    piece = file.read(min(PIECE, end - begin))
                    if not piece:
                        raise ChangedError(f"{self.path / name} ends at byte {begin}, {end} was asked for")
                    begin += len(piece)
                    if _stat(os.fstat(file.fileno())) != found:
                        raise ChangedError(f"{self.path / name} was changed while it was read; read it again")
                    yield piece
        except OSError as error:
            raise self._translated(name, error) from error

    def write(self, name: str, content: bytes | Path, *, only_if: str | None = None) -> str:
        """See `Storage`."""
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                if _lock(stack, target.parent):
                    _remove_parts(target)
                elif only_if is not None:
                    raise StorageError(
                        f"{target}: this file system has no locks, so another writer could be faster unseen; "
                        "write to one that has, or to object storage"
                    )
                self._check_condition(name, only_if)
                version = _replace(target, content)
            sync_folder(target.parent)
            return version
        except OSError as error:
            raise self._translated(name, error) from error

    def _check_condition(self, name: str, only_if: str | None) -> None:
        if only_if is None:
            return
        try:
            found = self.stat(name).version
        except MissingError:
            found = ABSENT
        if found != only_if:
            what = "is there already" if only_if == ABSENT else "is not what it was any more"
            raise ChangedError(f"{self.path / name} {what}; another writer was faster")

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `Storage`; hidden files are none of its objects."""
        found = []
        for folder, inner, files in os.walk(self.path, onerror=self._refuse):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for file in files:
                name = (Path(folder) / file).relative_to(self.path).as_posix()
                if not file.startswith(".") and name.startswith(prefix):
                    with contextlib.suppress(MissingError):  # removed meanwhile
                        found.append((name, self.stat(name).size))
        yield from sorted(found, key=lambda pair: os.fsencode(pair[0]))

    def _refuse(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # nothing was written yet, or it is removed already
            raise self._translated("", error) from error

    def remove(self, name: str) -> None:
        """See `Storage`."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._translated(name, error) from error

    def _translated(self, name: str, error: OSError) -> InputError | StorageError:
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) or error.errno == errno.ELOOP:
            return MissingError(f"{self.path / name} does not exist; check the path")
        if error.errno == errno.ENAMETOOLONG:
            return InputError(f"{str(self.path / name)[:80]}...: {error.strerror}; give a shorter one")
        return StorageError(f"{self.path / name}: {error.strerror or error}")


def _lock(stack: contextlib.ExitStack, folder: Path) -> bool:
    """Whether a folder is locked, which it is until the stack is left; False if its file system has no locks."""
    for path in (folder, folder / ".lock"):  # NFS locks only what is open for writing, as no folder can be
        try:
            held = stack.enter_context(exclusive(path, wait=60.0))
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
            continue
        if not held:
            raise StorageError(f"{folder} is being written to by another process; wait and try again")
        return True
    return False


def _remove_parts(target: Path) -> None:
    """Remove what killed writers left of a file; none that lives has one while the folder is locked."""
    part = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.part")
    for name in filter(part.fullmatch, os.listdir(target.parent)):
        (target.parent / name).unlink(missing_ok=True)


def _replace(target: Path, content: bytes | Path) -> str:
    """Put content in the place of a file, and return its version."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")  # no other's, even without a lock
    try:
        with open(part, "wb") as file:
            if isinstance(content, Path):
                with open(content, "rb") as source:
                    shutil.copyfileobj(source, file, PIECE)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            version = _stat(os.fstat(file.fileno())).version
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return version


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}")
