"""An end to Ray's wait for room: where the number of workers follows the nodes, it would wait for the fewest for ever."""

from __future__ import annotations

import time
from pathlib import Path

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    TrainControllerState,
)

POLL_S = 0.1


class Patience(ControllerCallback):  # type: ignore[misc]
    """What Ray's controller of a run asks while it waits. The controller is on the command's machine.

    Args:
        fewest: workers that the run needs.
        seconds: to wait for room for them.
        stop_file: of the run; the wait ends once it is there.
    """

    def __init__(self, fewest: int, seconds: float, stop_file: Path) -> None:
        self._fewest, self._seconds, self._stop_file = fewest, seconds, stop_file
        self._since: float | None = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Ends the controller by an error if it has waited for long enough.

        Raises:
            InterruptedError: the run is to stop.
            TimeoutError: no room.
        """
        waits = isinstance(current_state, (InitializingState, ReschedulingState, RestartingState))
        if not waits or current_state is not previous_state:  # only a decision to wait keeps the very state
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if self._stop_file.exists():
            raise InterruptedError("the run is to stop")
        if time.monotonic() - self._since > self._seconds:
            raise TimeoutError(f"no room for {self._fewest} workers (run.workers) came in {self._seconds:g} s")
        time.sleep(POLL_S)  # it asks again at once
