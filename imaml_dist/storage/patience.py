"""Trying again: how long, how often, and what it came to. Waits have full jitter, so that workers do not knock in step."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0


@dataclass
class Counters:
    """What this process has asked of object storage, and what it took; see `counters`."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0
    seconds_waited: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, float]:
        """All counters by name."""
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}


counters = Counters()
"""Of this process."""

# A fork is another process, and may have been made while a thread held the lock.
os.register_at_fork(after_in_child=lambda: Counters.__init__(counters))


class Patience:
    """The retry budget of one operation: seconds spent without progress.

    Args:
        seconds: the budget, >= 0.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = time.monotonic()
        self.failures = 0
        """Since the last progress."""
        self.total_failures = 0

    def progress(self) -> None:
        """Something was achieved: the budget is whole again."""
        self._since, self.failures = time.monotonic(), 0

    def excuse(self, seconds: float) -> None:
        """That time was somebody else's: it does not count."""
        self._since += seconds

    def wait(self) -> bool:
        """Note a failure and wait before the next try; False at once if the budget does not last for another."""
        self.failures += 1
        self.total_failures += 1
        left = self._seconds - self.spent
        if left <= 0:
            return False
        pause = min(random.uniform(0, min(FIRST_WAIT_S * 2 ** min(self.failures, 16), LONGEST_WAIT_S)), left)
        counters.add(retries=1, seconds_waited=pause)
        time.sleep(pause)
        return True

    @property
    def spent(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._since
