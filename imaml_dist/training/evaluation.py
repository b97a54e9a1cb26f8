"""Meta-testing: adapt to unseen tasks, classify their query images, and say how sure the mean is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource

TASKS_AT_ONCE = 10


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over tasks.

    Attributes:
        mean: of the tasks' query accuracies, 0..1.
        ci95: half width of its 95% interval, `1.96 s / sqrt(n)`; nan for one task.
        per_task: `n` accuracies in task order.
    """

    mean: float
    ci95: float
    per_task: list[float]

    @staticmethod
    def of(per_task: list[float]) -> Evaluation:
        """Mean and interval of n >= 1 accuracies."""
        n = len(per_task)
        mean = math.fsum(per_task) / n
        variance = math.fsum((a - mean) ** 2 for a in per_task) / (n - 1) if n > 1 else math.nan
        return Evaluation(mean, 1.96 * math.sqrt(variance / n), per_task)


def predict_queries(learner: MetaLearner, episodes: EpisodeBatch, theta: Tensor | None = None) -> Tensor:
    """Labels `[T, N*Q]` of the query samples after adapting to the support samples; -1 where outputs are not finite."""
    if learner.execution == "loop" and len(episodes) > 1:
        return torch.cat([predict_queries(learner, episodes[t : t + 1], theta) for t in range(len(episodes))])
    phi = learner.adapt_parameters(episodes.support_x, episodes.support_y, theta).params
    with torch.no_grad():
        outputs = learner.functional.predict(phi, episodes.query_x)
    return torch.where(outputs.isfinite().all(-1), outputs.argmax(-1), -1)


def task_accuracies(learner: MetaLearner, episodes: EpisodeBatch) -> Tensor:
    """Query accuracy per task, float64 `[T]`."""
    return (predict_queries(learner, episodes) == episodes.query_y).to(torch.float64).mean(-1)


def evaluate(
    learner: MetaLearner,
    source: TaskSource,
    tasks: int = 600,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate on tasks 0 .. `tasks` - 1 of step 0 of a source: the same tasks at every call.

    Args:
        learner: adapts with its own inner solver and proximal strength.
        source: of episodes of an unseen split.
        tasks: n >= 1; 600 is the field's custom.
        device: of the learner's model.
        progress: called with (tasks done, tasks in all).
    """
    accuracies: list[float] = []
    for begin in range(0, tasks, TASKS_AT_ONCE):
        batch = range(begin, min(begin + TASKS_AT_ONCE, tasks))
        accuracies += task_accuracies(learner, source.episodes(0, batch).to(device)).tolist()
        if progress is not None:
            progress(len(accuracies), tasks)
    return Evaluation.of(accuracies)
