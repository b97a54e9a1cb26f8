"""When a run is not started again: losses without a meta-step between them, of one command."""

import pytest

from imaml_dist.distributed.giving_up import TRIES, getting_on
from imaml_dist.errors import TrainingError
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

LOST = "rank 0 ended with signal SIGKILL"


def start(run, after):
    """As `resume` does."""
    reached = getting_on(run, after)
    run.record_start({"reached": reached, **({"after": after} if after else {})})


def test_so_many_losses_in_a_row_end_it_unless_a_meta_step_was_done_between_them(tmp_path):
    run = RunDirectory(tmp_path)
    for after in (None, *[LOST] * (TRIES - 1)):
        start(run, after)
    metrics_file.append(run.metrics_file, {"step": 0})
    for _ in range(TRIES):
        start(run, LOST)
    with pytest.raises(
        TrainingError, match=f"lost {TRIES} times in a row without another meta-step done after 1; .*{LOST}"
    ):
        start(run, LOST)


def test_starts_of_earlier_commands_are_no_losses(tmp_path):
    """They were interrupted in the meta-test, where no meta-step is left to be done."""
    run = RunDirectory(tmp_path)
    for _ in range(TRIES):
        start(run, None)
    for _ in range(TRIES - 1):
        start(run, LOST)
    with pytest.raises(TrainingError, match=f"lost {TRIES} times in a row"):
        start(run, LOST)
