"""How a training loop ends."""

from enum import IntEnum


class Stop(IntEnum):
    """Why the loop ended."""

    NOT_YET = 0
    STEPS = 1
    SECONDS = 2
    INTERRUPTED = 3
    PLATEAU = 4


Outcome = int | list[str]
"""Of a keeper, as it travels: a `Stop`, or type and message of the error that ended the run."""
