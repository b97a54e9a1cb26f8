"""Meta-testing: adapt to unseen tasks, classify their query images in two ways, and say how sure the mean is.

Transductive accuracy is the one that the field reports: batch normalisation sees all query images of a task together.
Inductive accuracy is what a user gets who asks about one image: its statistics come from the support set. For a network
without batch statistics the two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.errors import ModelError
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource

TASKS_AT_ONCE = 10

WAYS = 2
"""Columns of `task_accuracies`: transductive, inductive."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over tasks.

    Attributes:
        mean: of the tasks' query accuracies, 0..1.
        ci95: half width of its 95% interval, `1.96 s / sqrt(n)`; nan for one task.
        per_task: `n` accuracies in task order.
        inductive: the same where every query image is classified alone; None where the model cannot, or not measured.
    """

    mean: float
    ci95: float
    per_task: list[float]
    inductive: Evaluation | None = None

    @staticmethod
    def of(per_task: list[float], inductive: list[float] | None = None) -> Evaluation:
        """Mean and interval of n >= 1 accuracies."""
        n = len(per_task)
        mean = math.fsum(per_task) / n
        variance = math.fsum((a - mean) ** 2 for a in per_task) / (n - 1) if n > 1 else math.nan
        alone = None if inductive is None else Evaluation.of(inductive)
        return Evaluation(mean, 1.96 * math.sqrt(variance / n), per_task, alone)

    @staticmethod
    def of_rows(rows: Sequence[Sequence[float]]) -> Evaluation:
        """From rows of `task_accuracies`."""
        transductive, inductive = (list(column) for column in zip(*rows, strict=True))
        return Evaluation.of(transductive, None if any(map(math.isnan, inductive)) else inductive)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `{mean, ci95, per_task, inductive: {mean, ci95, per_task} or None}`."""
        alone = None if self.inductive is None else self.inductive.to_dict()
        if alone is not None:
            del alone["inductive"]
        return {"mean": self.mean, "ci95": self.ci95, "per_task": self.per_task, "inductive": alone}


@dataclass(frozen=True)
class Predictions:
    """Labels `[T, N*Q]` of query samples; -1 where outputs are not finite.

    Attributes:
        transductive: all query samples of a task in one batch.
        inductive: every query sample alone, batch statistics from the support set; None where the model cannot.
    """

    transductive: Tensor
    inductive: Tensor | None


def predict_queries(learner: MetaLearner, episodes: EpisodeBatch, theta: Tensor | None = None) -> Predictions:
    """Adapt to the support samples of T tasks, and classify their query samples."""
    if learner.execution == "loop" and len(episodes) > 1:
        parts = [predict_queries(learner, episodes[t : t + 1], theta) for t in range(len(episodes))]
        alone = [p.inductive for p in parts if p.inductive is not None]
        return Predictions(torch.cat([p.transductive for p in parts]), torch.cat(alone) if alone else None)
    phi = learner.adapt_parameters(episodes.support_x, episodes.support_y, theta).params
    with torch.no_grad():
        transductive = _labels(learner.functional.predict(phi, episodes.query_x))
        try:
            inductive = _labels(learner.functional.predict_inductive(phi, episodes.support_x, episodes.query_x))
        except ModelError:  # a layer whose statistics cannot be taken from the support set
            inductive = None
    return Predictions(transductive, inductive)


def task_accuracies(learner: MetaLearner, episodes: EpisodeBatch) -> Tensor:
    """Query accuracy per task, transductive and inductive, float64 `[T, 2]`; the second is nan where there is none."""
    found = predict_queries(learner, episodes)
    rows = torch.full((len(episodes), WAYS), torch.nan, dtype=torch.float64, device=episodes.query_y.device)
    for column, labels in enumerate((found.transductive, found.inductive)):
        if labels is not None:
            rows[:, column] = (labels == episodes.query_y).to(torch.float64).mean(-1)
    return rows


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
    rows: list[list[float]] = []
    for begin in range(0, tasks, TASKS_AT_ONCE):
        batch = range(begin, min(begin + TASKS_AT_ONCE, tasks))
        rows += task_accuracies(learner, source.episodes(0, batch).to(device)).tolist()
        if progress is not None:
            progress(len(rows), tasks)
    return Evaluation.of_rows(rows)


def _labels(outputs: Tensor) -> Tensor:
    return torch.where(outputs.isfinite().all(-1), outputs.argmax(-1), -1)
