"""No process outlives the one that it works for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SIGNAL_AT_PARENTS_DEATH = 1
"""PR_SET_PDEATHSIG of Linux."""


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, also if it is stopped then and cannot notice; Linux only.

    Args:
        parent: process id of the parent, which may be gone already; None does not look.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_DEATH, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
