"""A wait for room ends: after so many seconds without a worker, or once the run is to stop."""

import time

import pytest
from ray.train.v2._internal.execution.controller.state import InitializingState, RunningState

from imaml_dist.distributed.ray_room import Patience


def test_only_a_wait_without_any_change_ends_the_run(tmp_path):
    patience, waiting, running = Patience(2, 0.2, tmp_path / "stop"), InitializingState(), RunningState()
    for _ in range(2):
        patience.after_controller_state_update(waiting, waiting)
        time.sleep(0.15)
        patience.after_controller_state_update(waiting, running)
        patience.after_controller_state_update(running, RunningState())
    patience.after_controller_state_update(waiting, waiting)
    time.sleep(0.15)
    with pytest.raises(TimeoutError, match=r"no room for 2 workers \(run.workers\) came in 0.2 s"):
        patience.after_controller_state_update(waiting, waiting)


def test_a_request_to_stop_ends_the_wait_and_is_left_to_the_workers_where_there_are_any(tmp_path):
    patience, waiting = Patience(2, 600, tmp_path / "stop"), InitializingState()
    (tmp_path / "stop").touch()
    patience.after_controller_state_update(waiting, RunningState())
    with pytest.raises(InterruptedError):
        patience.after_controller_state_update(waiting, waiting)
