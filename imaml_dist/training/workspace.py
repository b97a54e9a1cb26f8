"""A folder of this process's own, for copies of what lies elsewhere; removed when the process ends, or by the next one if it could not."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from imaml_dist.storage.local import exclusive

_PREFIX = "imaml-run-"

_YOUNG_S = 60.0
"""Its maker may not have locked it yet."""


def new_workspace() -> Path:
    """An empty folder, which is locked while this process lives.

    Raises:
        OSError: the temporary folder is full or not writable.
    """
    parent = Path(tempfile.gettempdir())
    for other in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or removed meanwhile
            _sweep(other)
    made, held = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)), ExitStack()
    held.enter_context(exclusive(made))
    atexit.register(_end, made, held, os.getpid())
    return made


def _sweep(folder: Path) -> None:
    """Remove one whose process is no more."""
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG_S:
        return
    with exclusive(folder) as free:
        if free:
            shutil.rmtree(folder, ignore_errors=True)


def _end(folder: Path, held: ExitStack, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        held.close()
        shutil.rmtree(folder, ignore_errors=True)
