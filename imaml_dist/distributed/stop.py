"""How a training loop ends."""

from enum import IntEnum


class Stop(IntEnum):
    """Why the loop ended."""

    NOT_YET = 0
    STEPS = 1
    SECONDS = 2
    INTERRUPTED = 3
    PLATEAU = 4
