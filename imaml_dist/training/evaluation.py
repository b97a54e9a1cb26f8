"""Meta-testing: adapt to unseen tasks, judge their query samples in two ways, and say how sure the mean is.

Transductive accuracy is the one that the field reports: batch normalisation sees all query images of a task together.
Inductive accuracy is what a user gets who asks about one image: its statistics come from the support set. For a network
without batch statistics the two are equal. Where targets are numbers and no labels, the query loss stands in the place of
accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.errors import InputError, ModelError, NoRoomError
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource

TASKS_AT_ONCE = 10

Metric = Literal["accuracy", "loss"]


class Scored(IntEnum):
    """What the scores of a task are."""

    NOTHING = 0
    """Its data could not be used."""
    ACCURACY = 1
    LOSS = 2


COLUMNS = 3
"""Of `task_scores`: transductive, inductive, `Scored`."""


@dataclass(frozen=True)
class Evaluation:
    """Scores over tasks.

    Attributes:
        mean: of the tasks' query accuracies, 0..1, or of their query losses (`metric`). nan where a network has no
            transductive outputs: batch normalisation of one value per channel, as of a single query vector.
        ci95: half width of its 95% interval, `1.96 s / sqrt(n)`; nan for one task.
        per_task: `n` scores in task order.
        inductive: the same where every query sample is judged alone; None where the model cannot, or not measured.
        metric: `accuracy`, or `loss` where targets are floating point; a loss that is not finite is inf.
    """

    mean: float
    ci95: float
    per_task: list[float]
    inductive: Evaluation | None = None
    metric: Metric = "accuracy"

    @staticmethod
    def of(per_task: list[float], inductive: list[float] | None = None, metric: Metric = "accuracy") -> Evaluation:
        """Mean and interval of n >= 1 scores."""
        n = len(per_task)
        mean = math.fsum(per_task) / n
        variance = math.fsum((a - mean) ** 2 for a in per_task) / (n - 1) if n > 1 else math.nan
        alone = None if inductive is None else Evaluation.of(inductive, metric=metric)
        return Evaluation(mean, 1.96 * math.sqrt(variance / n), per_task, alone, metric)

    @staticmethod
    def of_rows(rows: Sequence[Sequence[float]]) -> Evaluation:
        """From rows of `task_scores`, in task order from task 0 on.

        Raises:
            InputError: some tasks could not be used. They are not left out, for a mean over other tasks than asked for could
                not be compared with anything.
        """
        transductive, inductive, scored = (list(column) for column in zip(*rows, strict=True))
        if bad := [str(task) for task, kind in enumerate(scored) if kind == Scored.NOTHING]:
            listed = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
            raise InputError(
                f"{len(bad)} of {len(scored)} tasks cannot be evaluated, having numbers that are not finite or labels that the model has "
                f"no output for: task {listed}; mend the source of these episodes, or evaluate on others"
            )
        metric: Metric = "loss" if Scored.LOSS in scored else "accuracy"
        return Evaluation.of(transductive, None if any(map(math.isnan, inductive)) else inductive, metric)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `{mean, ci95, per_task, metric, inductive: {mean, ci95, per_task} or None}`."""
        alone = None if self.inductive is None else self.inductive.to_dict()
        if alone is not None:
            del alone["inductive"], alone["metric"]
        scores = {"mean": self.mean, "ci95": self.ci95, "per_task": self.per_task}
        return {**scores, "metric": self.metric, "inductive": alone}


@dataclass(frozen=True)
class Predictions:
    """What adapted models say of query samples: outputs `[T, N*Q, ...]`, or labels `[T, N*Q]` where asked for.

    Attributes:
        transductive: all query samples of a task in one batch; None where one value per channel has no batch statistics.
        inductive: every query sample alone, batch statistics from the support set; None where the model cannot.
    """

    transductive: Tensor | None
    inductive: Tensor | None

    @staticmethod
    def joined(parts: Sequence[Predictions]) -> Predictions:
        """Those of several batches of tasks as one."""
        return Predictions(_joined([p.transductive for p in parts]), _joined([p.inductive for p in parts]))


def query_outputs(learner: MetaLearner, episodes: EpisodeBatch, theta: Tensor | None = None) -> Predictions:
    """Adapt to the support samples of T tasks, and evaluate their query samples in both ways.

    In one call, or in several where memory does not do for all at once, as meta-gradients are (`algorithms.memory`).

    Args:
        learner: adapts with its own inner solver and proximal strength.
        episodes: T tasks on its device.
        theta: meta-parameters `[P + R]`; the learner's own when None.

    Raises:
        ModelError: the model cannot be adapted to the support samples.
        NoRoomError: not even the smallest call fits into memory.
    """
    if len(episodes) > 1 and learner.one_by_one(episodes):
        return Predictions.joined([query_outputs(learner, episodes[t : t + 1], theta) for t in range(len(episodes))])
    parts: list[Predictions] = []
    memory = learner.memory_of(episodes, "evaluation")
    for size, found in memory.calls(len(episodes), lambda part: _outputs(learner, episodes[part], theta)):
        if found is None:
            raise NoRoomError(
                f"evaluating tasks {size} at a time takes more memory than {episodes.query_x.device} has; end other programs there, or "
                "take tasks with fewer query samples, or a smaller network"
            )
        parts.append(found)
    return Predictions.joined(parts)


def _outputs(learner: MetaLearner, episodes: EpisodeBatch, theta: Tensor | None) -> Predictions:
    """Of `query_outputs`, in one call."""
    phi = learner.adapt_parameters(episodes.support_x, episodes.support_y, theta).params
    functional = learner.functional
    with torch.no_grad():
        return Predictions(
            # Adapted it has been, so what is refused here is too few query samples for batch statistics, ...
            _unless_refused(lambda: functional.predict(phi, episodes.query_x)),
            # ... and here a layer whose statistics cannot be taken from the support set.
            _unless_refused(lambda: functional.predict_inductive(phi, episodes.support_x, episodes.query_x)),
        )


def predict_queries(learner: MetaLearner, episodes: EpisodeBatch, theta: Tensor | None = None) -> Predictions:
    """As `query_outputs`, with the label of the largest output; -1 where outputs are not finite."""
    found = query_outputs(learner, episodes, theta)
    return Predictions(*(None if o is None else _labels(o) for o in (found.transductive, found.inductive)))


def task_scores(learner: MetaLearner, episodes: EpisodeBatch) -> Tensor:
    """Query accuracy per task (or query loss, where targets are floating point), float64 `[T, 3]`.

    The columns are the transductive score, the inductive one, and `Scored`. A score is nan where there is none.
    """
    usable, valid = learner.usable(episodes)
    found, targets = query_outputs(learner, usable), usable.query_y
    kind = Scored.LOSS if targets.is_floating_point() else Scored.ACCURACY
    rows = torch.full((len(episodes), COLUMNS), torch.nan, dtype=torch.float64, device=targets.device)
    for column, outputs in enumerate((found.transductive, found.inductive)):
        if outputs is not None and kind is Scored.LOSS:
            losses = learner.loss(outputs, targets).detach().to(torch.float64)
            rows[:, column] = torch.where(losses.isfinite(), losses, torch.inf)
        elif outputs is not None:
            rows[:, column] = (_labels(outputs) == targets).to(torch.float64).flatten(1).mean(-1)
    rows[~valid, :2] = torch.nan
    rows[:, 2] = torch.where(valid, float(kind), float(Scored.NOTHING))
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

    Raises:
        InputError: tasks hold numbers that are not finite, or labels that the model has no output for; their numbers are named.
        ModelError: the model cannot be adapted to the support samples.
    """
    rows: list[list[float]] = []
    for begin in range(0, tasks, TASKS_AT_ONCE):
        batch = range(begin, min(begin + TASKS_AT_ONCE, tasks))
        rows += task_scores(learner, source.episodes(0, batch).to(device)).tolist()
        if progress is not None:
            progress(len(rows), tasks)
    return Evaluation.of_rows(rows)


def _unless_refused(outputs: Callable[[], Tensor]) -> Tensor | None:
    try:
        return outputs()
    except ModelError:
        return None


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _labels(outputs: Tensor) -> Tensor:
    return torch.where(outputs.isfinite().all(-1), outputs.argmax(-1), -1)
