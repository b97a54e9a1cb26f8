"""When to go on trying no longer: losses without progress between them, and meta-steps that are skipped one after the other."""

from __future__ import annotations

from imaml_dist.config.schema import RunConfig
from imaml_dist.errors import TrainingError
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import MetaState

TRIES = 4
"""Losses in a row that are mended although none of them left time for a meta-step."""


def getting_on(run: RunDirectory, after: str | None) -> int:
    """The meta-steps that have been taken, whether or not a checkpoint holds them.

    Args:
        run: about to be started again.
        after: why it is; None if it was not started before by this command.

    Raises:
        TrainingError: one loss follows another, and nothing is achieved between them.
    """
    reached, last = metrics_file.reached(run.metrics_file), run.starts()[-TRIES:]
    mended = all("after" in start for start in last[1:])  # by this command: its first start comes after nothing
    if after is not None and len(last) == TRIES and mended and all(start.get("reached") == reached for start in last):
        raise TrainingError(
            f"workers were lost {TRIES} times in a row without another meta-step done after {reached}; the last time {after}; see the "
            "worker logs, then run the same command again to resume"
        )
    return reached


def not_stuck(config: RunConfig, run: RunDirectory, state: MetaState) -> None:
    """Go on while not too many meta-steps in a row were skipped.

    Raises:
        TrainingError: `run.give_up_after` were.
    """
    skipped = state.skipped_in_a_row
    if skipped >= config.give_up_after:
        ended = ", ".join(f"{n} {name}" for name, n in state.ledger.outcomes_of_last(skipped).items())
        newest = run.newest_step()
        raise TrainingError(
            f"{skipped} meta-steps in a row were skipped, because more than half of their tasks were excluded or the gradient "
            f"was not finite (their tasks ended {ended}); the last good checkpoint is of step {newest}; try a smaller "
            "algorithm.inner.lr or outer.lr, or a larger run.give_up_after"
        )
