"""How much arithmetic a task takes, phase by phase, whatever computes it."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.tasks.episode import EpisodeBatch


def flops_by_phase(learner: MetaLearner, episodes: EpisodeBatch) -> dict[str, int]:
    """FLOPs of the first task's meta-gradient, `{"inner": ..., "query": ..., "solve": ...}`.

    Counted are convolutions and products of matrices, a multiplication and an addition as two, in torch's own operations with
    one task at a time: what another execution computes besides that is no use to anybody.

    Args:
        learner: its meta-parameters are used and left alone.
        episodes: T >= 1 tasks.
    """
    plain = MetaLearner(learner.model, learner.algorithm, learner.loss, execution="loop")
    found: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter:

        def lap(phase: str) -> None:
            found[phase] = found.get(phase, 0) + counter.get_total_flops() - sum(found.values())

        plain.algorithm.meta_gradient(plain.problem(episodes[:1], learner.meta_parameters(), lap))
        lap("solve")
    return found
