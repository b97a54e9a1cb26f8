"""Work in a thread of its own, while the main thread shows how far it is and hears signals."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(threading.Thread, Generic[T]):
    """`work()` in a daemon thread; what it returned or raised is handed over by `outcome`."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """For `start`."""
        try:
            self._result.append(self._work())
        except BaseException as error:  # raised where the outcome is asked for
            self._error = error

    def outcome(self) -> T:
        """Wait for the end; the result.

        Raises:
            BaseException: what the work raised.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._result[0]
