"""The meta-learner: a model, an algorithm and a loss, and what can be done with the three."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.functional import cross_entropy as torch_cross_entropy

from imaml_dist.algorithms.records import IMAML, Algorithm
from imaml_dist.core.curvature import Matvec, Objective, gauss_newton_operator
from imaml_dist.core.implicit import MetaGradient, implicit_meta_gradient
from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.solution import LinearSolution, Outcome
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.unrolled import first_order_meta_gradient
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.tasks.episode import EpisodeBatch

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(outputs [T, n, ...], targets [T, n, ...]) -> [T]`, the mean over each task's samples."""

Execution = Literal["vmap", "loop"]

NO_SOLVE = -1
"""Stands for the linear solver's outcome and iterations in records of methods that solve no system."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy per task: `[T, n, C]` logits, `[T, n]` labels -> `[T]`."""
    losses = torch_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape).mean(-1)


@dataclass(frozen=True)
class TaskRecord:
    """What happened in each task, one `[T]` tensor per fact.

    Attributes:
        outcome: `TaskOutcome`; tasks that are not OK are excluded.
        support_loss, query_loss, query_accuracy: at the adapted parameters.
        cg_outcome, cg_iterations: of the linear solve; `NO_SOLVE` where there was none.
        cg_residual: true relative residual of that solve; nan where there was none.
        stationarity: `||grad G(phi)|| / ||grad G(theta)||` of the inner solve.
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
    distance: Tensor
    cosine: Tensor

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
    """Per-task meta-gradients `[T, P]` (zero rows for excluded tasks), their record, and seconds by phase."""

    rows: Tensor
    tasks: TaskRecord
    seconds: dict[str, float]

    @property
    def accepted(self) -> Tensor:
        """`[T]` bool, tasks that count."""
        return self.tasks.outcome == int(TaskOutcome.OK)


@dataclass(frozen=True)
class MeanMetaGradient:
    """Mean over the accepted tasks: `gradient` by parameter name, and the record of every task."""

    gradient: dict[str, Tensor]
    tasks: TaskRecord


class MetaLearner:
    """A model that learns to adapt.

    Args:
        model: any nn.Module whose output is determined by parameters and input (`FunctionalModel` says what it
            refuses). Its parameters are the meta-parameters theta; train them with any torch optimiser after
            `backward`.
        algorithm: `IMAML(...)` or `FOMAML(...)`.
        loss: `(outputs [T, n, ...], targets) -> [T]`.
        execution: `vmap` evaluates all given tasks in one vectorised call (GPUs), `loop` one after the other (CPUs).
            Results agree to rounding only, so it is part of a run's configuration.
    """

    def __init__(
        self, model: nn.Module, algorithm: Algorithm, loss: Loss = cross_entropy, execution: Execution = "loop"
    ) -> None:
        self.functional = FunctionalModel(model)
        self.algorithm = algorithm
        self.loss = loss
        self.execution = execution

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are theta."""
        return self.functional.module

    def meta_gradient(self, episodes: EpisodeBatch) -> MeanMetaGradient:
        """Mean meta-gradient of the accepted tasks; zero if there is none."""
        out = self.task_gradients(episodes)
        mean = out.rows.sum(0) / out.accepted.sum().clamp(min=1)
        return MeanMetaGradient(gradient=self.functional.layout.unflatten(mean), tasks=out.tasks)

    def backward(self, episodes: EpisodeBatch) -> MeanMetaGradient:
        """As `meta_gradient`, and accumulate it into the parameters' `.grad`, as `loss.backward()` would."""
        out = self.meta_gradient(episodes)
        for name, parameter in self.model.named_parameters():
            if name in out.gradient:
                parameter.grad = out.gradient[name] if parameter.grad is None else parameter.grad + out.gradient[name]
        return out

    def task_gradients(self, episodes: EpisodeBatch, theta: Tensor | None = None) -> TaskGradients:
        """Meta-gradients task by task.

        Args:
            episodes: T tasks on the model's device.
            theta: meta-parameters `[P]`; the model's own when None.
        """
        theta = self.functional.parameters() if theta is None else theta
        if self.execution == "vmap" or len(episodes) == 1:
            return self._batch_gradients(episodes, theta)
        parts = [self._batch_gradients(episodes[t : t + 1], theta) for t in range(len(episodes))]
        return TaskGradients(
            rows=torch.cat([p.rows for p in parts]),
            tasks=TaskRecord(*(torch.cat([getattr(p.tasks, n) for p in parts]) for n in TaskRecord.names())),
            seconds={phase: sum(p.seconds[phase] for p in parts) for phase in parts[0].seconds},
        )

    def adapt_parameters(self, support_x: Tensor, support_y: Tensor, theta: Tensor | None = None) -> InnerSolution:
        """Solve the inner problem of T tasks: `[T, n, ...]` samples and `[T, n]` labels -> phi `[T, P]`."""
        theta = self.functional.parameters() if theta is None else theta
        anchor = theta.expand(support_x.shape[0], -1)
        return gradient_descent(
            self._objective(support_x, support_y),
            anchor,
            lr=self.algorithm.inner.lr,
            steps=self.algorithm.inner.steps,
            proximal=self._proximal,
        )

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        """An ordinary module with this model's structure, adapted to one task's samples `[n, ...]` and labels `[n]`."""
        solution = self.adapt_parameters(support_x.unsqueeze(0), support_y.unsqueeze(0))
        adapted = FunctionalModel(copy.deepcopy(self.model))
        adapted.load(solution.params[0])
        return adapted.module

    @property
    def _proximal(self) -> ScalarProximal | None:
        return ScalarProximal(self.algorithm.lam) if isinstance(self.algorithm, IMAML) else None

    def _objective(self, x: Tensor, y: Tensor) -> Objective:
        return lambda params: self.loss(self.functional.predict(params, x), y)

    def _batch_gradients(self, episodes: EpisodeBatch, theta: Tensor) -> TaskGradients:
        clock = _Clock(theta.device)
        anchor = theta.expand(len(episodes), -1)
        inner = self.adapt_parameters(episodes.support_x, episodes.support_y, theta)
        clock.lap("inner")

        correct: list[Tensor] = []

        def query_loss(params: Tensor) -> Tensor:
            outputs = self.functional.predict(params, episodes.query_x)
            correct.append(_accuracy(outputs.detach(), episodes.query_y))
            return self.loss(outputs, episodes.query_y)

        outcome = inner.outcome
        if isinstance(self.algorithm, IMAML):
            meta = self._implicit(self.algorithm, episodes, query_loss, inner.params, anchor)
            if self.algorithm.solver.on_negative_curvature == "exclude" and meta.solution is not None:
                negative = meta.solution.outcome == int(Outcome.NEGATIVE_CURVATURE)
                outcome = torch.where(negative & (outcome == 0), int(TaskOutcome.SOLVE_FAILED), outcome)
        else:
            meta = first_order_meta_gradient(query_loss, inner.params)
        clock.lap("solve")

        finite = meta.gradient.isfinite().all(-1) & meta.first_order.isfinite().all(-1) & meta.query_loss.isfinite()
        if meta.solution is not None:  # the solver returns its last finite iterate, which says nothing of the task
            finite &= meta.solution.outcome != int(Outcome.NON_FINITE)
        outcome = torch.where((outcome == 0) & ~finite, int(TaskOutcome.NON_FINITE), outcome)
        rows = torch.where((outcome == int(TaskOutcome.OK))[:, None], meta.gradient, 0.0)
        none = torch.full_like(outcome, NO_SOLVE)
        solution = meta.solution
        record = TaskRecord(
            outcome=outcome,
            support_loss=inner.loss,
            query_loss=meta.query_loss,
            query_accuracy=correct[0],
            cg_outcome=none if solution is None else solution.outcome,
            cg_iterations=none if solution is None else solution.iterations,
            cg_residual=torch.full_like(inner.loss, torch.nan) if solution is None else solution.residual,
            stationarity=inner.stationarity,
            distance=torch.linalg.vector_norm(inner.params - anchor, dim=-1),
            # In float64, for the squares of small gradients vanish in float32.
            cosine=cosine_similarity(meta.gradient.double(), meta.first_order.double(), dim=-1, eps=1e-300),
        )
        return TaskGradients(rows=rows, tasks=record, seconds=clock.seconds)

    def _implicit(
        self, algorithm: IMAML, episodes: EpisodeBatch, query_loss: Objective, phi: Tensor, anchor: Tensor
    ) -> MetaGradient:
        support_loss = self._objective(episodes.support_x, episodes.support_y)
        solver = algorithm.solver
        solve = partial(
            implicit_meta_gradient,
            support_loss,
            query_loss,
            phi,
            anchor,
            proximal=ScalarProximal(algorithm.lam),
            solve=partial(conjugate_gradient, max_iterations=solver.max_iterations, rtol=solver.rtol),
            damping=solver.damping,
        )

        def gauss_newton() -> Matvec:
            return gauss_newton_operator(
                lambda params: self.functional.predict(params, episodes.support_x),
                lambda outputs: self.loss(outputs, episodes.support_y),
                phi,
            )

        if solver.operator == "gauss_newton":
            return solve(curvature=gauss_newton())
        meta = solve()
        if solver.on_negative_curvature == "gauss_newton":
            assert meta.solution is not None
            redo = meta.solution.outcome == int(Outcome.NEGATIVE_CURVATURE)
            if bool(redo.any()):
                again = solve(curvature=gauss_newton())
                meta = _replace(meta, again, redo)
        return meta


def _replace(meta: MetaGradient, again: MetaGradient, redo: Tensor) -> MetaGradient:
    """`meta` with the tasks of `redo` from `again`; their outcome stays NEGATIVE_CURVATURE, so the fallback is counted."""
    old, new = meta.solution, again.solution
    assert old is not None
    assert new is not None
    solution = LinearSolution(
        value=torch.where(redo[:, None], new.value, old.value),
        outcome=torch.where(redo & (new.outcome == int(Outcome.NON_FINITE)), new.outcome, old.outcome),
        iterations=torch.where(redo, new.iterations, old.iterations),
        residual=torch.where(redo, new.residual, old.residual),
    )
    gradient = torch.where(redo[:, None], again.gradient, meta.gradient)
    return MetaGradient(gradient, meta.first_order, meta.query_loss, solution)


def _accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Fraction of samples whose largest output is the label, `[T]`; nan where targets are not class labels."""
    if labels.is_floating_point():
        return torch.full((labels.shape[0],), torch.nan, dtype=outputs.dtype, device=outputs.device)
    return (outputs.argmax(-1) == labels).to(outputs.dtype).mean(-1)


class _Clock:
    """Seconds by phase, with the device's queue drained at each lap so that the split is true."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now
