"""A first Ctrl-C asks for an end in good order, a second one is obeyed at once."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines import console
from pipelines.exit_codes import INTERRUPTED


@contextmanager
def on_signals(ask: Callable[[], None], goes_on: str) -> Iterator[None]:
    """SIGINT and SIGTERM `ask` for an end in good order; a second one ends this process with INTERRUPTED.

    Args:
        ask: called in the main thread.
        goes_on: what the user is told at the second signal, after "stopped at once; ".
    """
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            # Not by an exception: it would wait for a thread that is in the middle of a step.
            console.err.print(f"stopped at once; {goes_on}")
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        asked = True
        ask()

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
