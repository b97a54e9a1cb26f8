"""What happened in each task of a meta-step, and the meta-gradients task by task."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.outcome import TaskOutcome

NO_SOLVE = -1
"""Stands for the linear solver's outcome and iterations in records of methods that solve no system."""


@dataclass(frozen=True)
class TaskRecord:
    """What happened in each task, one `[T]` tensor per fact.

    Attributes:
        outcome: `TaskOutcome`; tasks that are not OK are excluded.
        support_loss, query_loss, query_accuracy: at the adapted parameters.
        cg_outcome, cg_iterations: of the linear solve, whichever solver it is; `NO_SOLVE` where there was none.
        cg_residual: true relative residual of that solve; nan where there was none.
        stationarity: `||grad G(phi)|| / ||grad G(theta)||` of the inner solve.
        inner_steps: steps of the inner solver.
        distance: `||phi - theta||`.
        cosine: between the meta-gradient and the first-order one.
    """

    outcome: Tensor
    support_loss: Tensor
    query_loss: Tensor
    query_accuracy: Tensor
    cg_outcome: Tensor
    cg_iterations: Tensor
    cg_residual: Tensor
    stationarity: Tensor
    inner_steps: Tensor
    distance: Tensor
    cosine: Tensor

    @classmethod
    def of(
        cls, outcome: Tensor, inner: InnerSolution, meta: MetaGradient, accuracy: Tensor, anchor: Tensor
    ) -> TaskRecord:
        """The record of tasks that were adapted from `anchor` and differentiated."""
        none, solution = torch.full_like(outcome, NO_SOLVE), meta.solution
        return cls(
            outcome=outcome,
            support_loss=inner.loss,
            query_loss=meta.query_loss,
            query_accuracy=accuracy,
            cg_outcome=none if solution is None else solution.outcome,
            cg_iterations=none if solution is None else solution.iterations,
            cg_residual=torch.full_like(inner.loss, torch.nan) if solution is None else solution.residual,
            stationarity=inner.stationarity,
            inner_steps=inner.steps,
            distance=torch.linalg.vector_norm(inner.params - anchor, dim=-1),
            # In float64, for the squares of small gradients vanish in float32.
            cosine=cosine_similarity(meta.gradient.double(), meta.first_order.double(), dim=-1, eps=1e-300),
        )

    @classmethod
    def lost(cls, tasks: int, outcome: TaskOutcome, device: torch.device, dtype: torch.dtype) -> TaskRecord:
        """The record of tasks of which nothing was computed."""
        facts = {f.name: torch.full((tasks,), torch.nan, device=device, dtype=dtype) for f in fields(cls)}
        codes = {"outcome": int(outcome), "cg_outcome": NO_SOLVE, "cg_iterations": NO_SOLVE, "inner_steps": 0}
        return cls(**facts | {name: torch.full((tasks,), code, device=device) for name, code in codes.items()})

    @classmethod
    def names(cls) -> list[str]:
        """The facts, in the order of `to_rows`."""
        return [f.name for f in fields(cls)]

    def to_rows(self) -> Tensor:
        """All facts as float64 `[T, F]`, for travelling between workers."""
        return torch.stack([getattr(self, name).to(torch.float64) for name in self.names()], dim=1)

    @classmethod
    def from_rows(cls, rows: Tensor) -> TaskRecord:
        """Inverse of `to_rows`, every fact in float64."""
        return cls(*rows.unbind(1))


@dataclass(frozen=True)
class TaskGradients:
    """Per-task meta-gradients `[T, P + R]` (zero rows for excluded tasks), their record, and seconds by phase."""

    rows: Tensor
    tasks: TaskRecord
    seconds: dict[str, float]

    @property
    def accepted(self) -> Tensor:
        """`[T]` bool, tasks that count."""
        return self.tasks.outcome == int(TaskOutcome.OK)

    @staticmethod
    def joined(parts: list[TaskGradients]) -> TaskGradients:
        """One after the other."""
        return TaskGradients(
            rows=torch.cat([p.rows for p in parts]),
            tasks=TaskRecord(*(torch.cat([getattr(p.tasks, n) for p in parts]) for n in TaskRecord.names())),
            seconds={
                phase: sum(p.seconds.get(phase, 0.0) for p in parts)
                for phase in dict.fromkeys(k for p in parts for k in p.seconds)
            },
        )


def task_outcome(inner: InnerSolution, meta: MetaGradient, valid: Tensor, exclude_negative_curvature: bool) -> Tensor:
    """`TaskOutcome` codes `[T]`: the first of bad data, a failed inner solve, a refused linear solve, numbers not finite.

    Args:
        inner: inner solve.
        meta: meta-gradients.
        valid: `[T]` bool, whether the episode's data can be used.
        exclude_negative_curvature: whether a linear solve that met it costs the task.
    """
    finite = meta.gradient.isfinite().all(-1) & meta.first_order.isfinite().all(-1) & meta.query_loss.isfinite()
    for rows in meta.own.values():
        finite &= rows.reshape(len(valid), -1).isfinite().all(-1)
    refused = torch.zeros_like(finite)
    if meta.solution is not None:  # the solver returns its last finite iterate, which says nothing of the task
        finite &= meta.solution.outcome != int(Outcome.NON_FINITE)
        if exclude_negative_curvature:
            refused = meta.solution.outcome == int(Outcome.NEGATIVE_CURVATURE)
    outcome = torch.where(valid, inner.outcome, int(TaskOutcome.BAD_EPISODE))
    outcome = torch.where((outcome == 0) & refused, int(TaskOutcome.SOLVE_FAILED), outcome)
    return torch.where((outcome == 0) & ~finite, int(TaskOutcome.NON_FINITE), outcome)
