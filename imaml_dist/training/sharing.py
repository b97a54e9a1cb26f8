"""Sharing what is new beside the work: again and again, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from imaml_dist.errors import ImamlError

SHARE_S = 1.0
"""Between two looks for what is new, on either side."""


@contextmanager
def every_second(share: Callable[[], None]) -> Iterator[None]:
    """Do something again and again in a thread of its own, and, if all went well, once more in the end."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(SHARE_S):
            # Of storage or of a full disk: the next time, perhaps. Of a lost lease: whoever writes finds out.
            with suppress(ImamlError, OSError):
                share()

    thread = threading.Thread(target=loop, name="sharing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    share()
