"""How much arithmetic a task takes, phase by phase."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.kernels import native
from imaml_dist.tasks.episode import EpisodeBatch


def flops_by_phase(learner: MetaLearner, episodes: EpisodeBatch) -> dict[str, int]:
    """FLOPs of the first task's meta-gradient, `{"inner": ..., "query": ..., "solve": ...}`.

    Counted are convolutions and products of matrices as the learner's execution computes them, a multiplication and an addition as
    two. For second derivatives torch's kernels compute more than is asked for; ours do not.

    Args:
        learner: its meta-parameters are used and left alone.
        episodes: T >= 1 tasks.
    """
    episodes, _ = learner.usable(episodes[:1])
    found: dict[str, int] = {}
    ours = native.flops if learner.execution == "native" else lambda: 0
    begun = ours()
    with FlopCounterMode(display=False) as torchs:

        def lap(phase: str) -> None:
            so_far = torchs.get_total_flops() + ours() - begun
            found[phase] = found.get(phase, 0) + so_far - sum(found.values())

        learner.algorithm.meta_gradient(learner.problem(episodes, learner.meta_parameters(), lap))
        lap("solve")
    return found
