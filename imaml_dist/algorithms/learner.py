"""The meta-learner: a model, an algorithm and a loss, and what can be done with the three."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imaml_dist.algorithms.algorithm import Algorithm
from imaml_dist.algorithms.loss import Loss, cross_entropy, preflight_loss
from imaml_dist.algorithms.memory import MemoryModel
from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.algorithms.record import TaskGradients, TaskRecord, task_outcome
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.masks import derived_key
from imaml_dist.models.preflight import can_be_tried, preflight
from imaml_dist.tasks.episode import EpisodeBatch
from imaml_dist.tasks.validity import sanitised, validity

Execution = Literal["vmap", "loop", "native"]

ONE_BY_ONE = 64
"""Support samples above which `native` execution computes one task after the other: a task fills the caches by itself then."""

OWN = "algorithm."
"""What the algorithm's own learned parameters are named with, among the model's."""


@dataclass(frozen=True)
class MeanMetaGradient:
    """Mean over the accepted tasks: `gradient` by parameter name, and the record of every task."""

    gradient: dict[str, Tensor]
    tasks: TaskRecord


class MetaLearner:
    """A model that learns to adapt.

    The meta-parameters are the model's parameters that require a gradient, P of them, and those the algorithm learns
    itself (a learned proximal strength, learned step sizes), R of them, usually none. Train `parameters()` with any torch
    optimiser after `backward`.

    Args:
        model: any nn.Module (`FunctionalModel` says what happens to normalisation, dropout, buffers).
        algorithm: `IMAML(...)`, `MAML(...)`, `FOMAML(...)`, `Reptile(...)`, `ANIL(...)`, `MetaSGD(...)`, or one's own.
        loss: `(outputs [T, n, ...], targets) -> [T]`.
        execution: `vmap` evaluates all given tasks in one vectorised call, `loop` one after the other, both by torch's kernels;
            `native` all in one call with convolutions and batch normalisations by our own (CPUs; needs a C++ compiler
            once). Results agree to rounding only, so it is part of a run's configuration.
        autocast: compute the network's convolutions and products of matrices in this type (`torch.bfloat16`), with torch's
            kernels; parameters, losses, gradients and the solvers' inner products keep the model's own type.

    Raises:
        ValueError: `autocast` with `native`, whose kernels know float32 and float64.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        loss: Loss = cross_entropy,
        execution: Execution = "loop",
        autocast: torch.dtype | None = None,
    ) -> None:
        if autocast is not None and execution == "native":
            raise ValueError(f"autocast={autocast} is not for execution='native'; use 'vmap' or 'loop'")
        self.functional = FunctionalModel(model, execution == "native", autocast)
        self.algorithm = algorithm
        self.loss = loss
        self.execution = execution
        theta = self.functional.parameters()
        self.own = {
            name: nn.Parameter(value.to(theta.device))
            for name, value in algorithm.own_parameters(self.functional.layout, theta.dtype).items()
        }
        self.own_layout = ParameterLayout.of(self.own)
        names = self.functional.layout.names + tuple(OWN + name for name in self.own)
        self.layout = ParameterLayout(names, self.functional.layout.shapes + self.own_layout.shapes)
        self._classes: int | None = None
        self._tried = False
        self._trial: int | None = None  # bytes
        self._memory: dict[tuple[Any, ...], MemoryModel] = {}

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are theta."""
        return self.functional.module

    def parameters(self) -> Iterator[nn.Parameter]:
        """All meta-parameters, the model's first, in the order of the layout."""
        yield from dict(self.named_parameters()).values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All meta-parameters under the layout's names."""
        named = dict(self.model.named_parameters())
        yield from ((name, named[name]) for name in self.functional.layout.names)
        yield from ((OWN + name, parameter) for name, parameter in self.own.items())

    def meta_parameters(self) -> Tensor:
        """All meta-parameters as one detached vector `[P + R]`."""
        if not self.own:
            return self.functional.parameters()
        own = {name: parameter.detach() for name, parameter in self.own.items()}
        return torch.cat([self.functional.parameters(), self.own_layout.flatten(own)])

    def describe_own(self) -> dict[str, float]:
        """Smallest, median and largest value of what the algorithm learns besides the model: `lam_min`, `lam_median`, ..."""
        values = self.algorithm.describe({n: p.detach() for n, p in self.own.items()}, self.functional.layout)
        return {
            f"{name}_{what}": float(of(value.double()))
            for name, value in values.items()
            for what, of in (("min", torch.min), ("median", torch.median), ("max", torch.max))
        }

    def meta_gradient(self, episodes: EpisodeBatch | Sequence[EpisodeBatch]) -> MeanMetaGradient:
        """Mean meta-gradient of the accepted tasks; zero if there is none.

        Args:
            episodes: tasks of one shape, or a sequence of such batches for tasks of several shapes.
        """
        batches = [episodes] if isinstance(episodes, EpisodeBatch) else episodes
        out = TaskGradients.joined([self.task_gradients(batch) for batch in batches])
        mean = out.rows.sum(0) / out.accepted.sum().clamp(min=1)
        return MeanMetaGradient(gradient=self.layout.unflatten(mean), tasks=out.tasks)

    def backward(self, episodes: EpisodeBatch | Sequence[EpisodeBatch]) -> MeanMetaGradient:
        """As `meta_gradient`, and accumulate it into the parameters' `.grad`, as `loss.backward()` would."""
        out = self.meta_gradient(episodes)
        for name, parameter in self.named_parameters():
            parameter.grad = out.gradient[name] if parameter.grad is None else parameter.grad + out.gradient[name]
        return out

    def task_gradients(self, episodes: EpisodeBatch, theta: Tensor | None = None) -> TaskGradients:
        """Meta-gradients task by task.

        Args:
            episodes: T tasks on the model's device.
            theta: meta-parameters `[P + R]`; the learner's own when None.
        """
        theta = self.meta_parameters() if theta is None else theta
        if len(episodes) == 1 or not self.one_by_one(episodes):
            return self._as_fits(episodes, theta)
        return TaskGradients.joined([self._as_fits(episodes[t : t + 1], theta) for t in range(len(episodes))])

    def one_by_one(self, episodes: EpisodeBatch) -> bool:
        """Whether such tasks are computed one after the other."""
        large = self.execution == "native" and episodes.support_x.shape[1] > ONE_BY_ONE
        return large or self.execution == "loop"

    def adapt_parameters(self, support_x: Tensor, support_y: Tensor, theta: Tensor | None = None) -> InnerSolution:
        """Adapt to T tasks as at meta-test, without dropout: `[T, n, ...]` samples and `[T, n]` labels -> phi `[T, P]`."""
        theta = self.meta_parameters() if theta is None else theta
        samples = Samples(support_x, support_y)
        return self.algorithm.adapt(self._problem(samples, samples, theta))

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        """An ordinary module with this model's structure, adapted to one task's samples `[n, ...]` and labels `[n]`.

        It is in evaluation mode and drops nothing; layers that use batch statistics here go on to use them.
        """
        solution = self.adapt_parameters(support_x.unsqueeze(0), support_y.unsqueeze(0))
        return self.functional.standalone(solution.params[0])

    def preflight(self, episodes: EpisodeBatch) -> None:
        """Try whether the model can be meta-trained on such episodes; done once, by the first meta-gradient at the latest.

        Args:
            episodes: T >= 1 tasks with finite samples, on the model's device.

        Raises:
            ModelError: it cannot; the message names the layer and the way out (`models.preflight`).
            LossError: the loss is not one number per task, each of its own outputs (`algorithms.loss`).
        """
        twice, vectorised = self.algorithm.second_order, self.execution != "loop"
        trial = MemoryModel(episodes.support_x.device)
        with trial.watched(1):
            preflight(self.functional, episodes.support_x, episodes.key, vectorised=vectorised, twice=twice)
        self._trial = trial.measured.get(1)
        preflight_loss(self.loss, self._support_outputs(episodes[:1]), episodes.support_y[:1], twice=twice)
        # Decided here, on good samples, and not by the first task whose curvature is asked for, which may be a bad one.
        self.functional.samples_independent(episodes.support_x, episodes.key)
        self._tried = True

    def problem(
        self, episodes: EpisodeBatch, theta: Tensor, lap: Callable[[str], None] = lambda phase: None
    ) -> TaskProblem:
        """What an algorithm is given of T tasks; `lap` is called with the name of each phase as it ends."""
        support = Samples(episodes.support_x, episodes.support_y, derived_key(episodes.key, 0))
        query = Samples(episodes.query_x, episodes.query_y, derived_key(episodes.key, 1))
        return self._problem(support, query, theta, lap)

    def usable(self, episodes: EpisodeBatch) -> tuple[EpisodeBatch, Tensor]:
        """The episodes with zeros in place of bad tasks, and which are good, `[T]` bool (`tasks.validity`)."""
        valid = validity(episodes, self._outputs(episodes))
        return sanitised(episodes, valid), valid

    def _problem(
        self, support: Samples, query: Samples, theta: Tensor, lap: Callable[[str], None] = lambda phase: None
    ) -> TaskProblem:
        anchor, own = theta[: self.functional.layout.size], theta[self.functional.layout.size :]
        return TaskProblem(
            functional=self.functional,
            loss=self.loss,
            anchor=anchor.expand(support.x.shape[0], -1),
            support=support,
            query=query,
            own=self.own_layout.unflatten(own) if self.own else {},
            lap=lap,
        )

    def _as_fits(self, episodes: EpisodeBatch, theta: Tensor) -> TaskGradients:
        """In one call, or in several where memory does not do for all at once (`algorithms.memory`).

        A call has two tasks at least. As many as they may be, tasks of convolutional networks have the same bits then (under `vmap` as far
        as torch's grouped convolutions have, which on CPUs without AVX-512 round images of one channel by the number of groups); a task
        alone takes another way through torch, and may differ in its last digits, so the two or three of a smallest call are lost
        if they do not fit. Under `vmap` networks with layers of odd widths may differ there in calls of other sizes too
        (`part_sizes`): what is predicted to fit in one call is never cut, and a first few are computed once more with all.

        Raises:
            NoRoomError: on a CPU, where not even the smallest call would fit: the system would end the process.
        """
        if not self._tried:
            with suppress(torch.OutOfMemoryError):  # what follows does not fit either then, and says so task by task
                self._preflight_where_finite(episodes)
        parts: list[TaskGradients] = []
        calls = self.memory_of(episodes).calls(len(episodes), lambda part: self._batch_gradients(episodes[part], theta))
        for size, found in calls:
            if found is None:
                tasks = TaskRecord.lost(size, TaskOutcome.OUT_OF_MEMORY, theta.device, theta.dtype)
                found = TaskGradients(theta.new_zeros(size, theta.shape[0]), tasks, seconds={})
            parts.append(found)
        return parts[0] if len(parts) == 1 else TaskGradients.joined(parts)

    def memory_of(self, episodes: EpisodeBatch, what: str = "meta-gradient") -> MemoryModel:
        """The model of the memory that this takes for tasks of this shape."""
        x, device = (episodes.support_x, episodes.query_x), episodes.support_x.device
        key = (what, *(t.shape[1:] for t in x), *(t.dtype for t in x), device)
        if key not in self._memory:
            self._memory[key] = MemoryModel(device, self._trial)
        return self._memory[key]

    def _batch_gradients(self, episodes: EpisodeBatch, theta: Tensor) -> TaskGradients:
        clock = _Clock(theta.device)
        usable, valid = self.usable(episodes)
        rows, tasks = self._compute(usable, valid, theta, clock)
        clock.lap("solve")
        return TaskGradients(rows=rows, tasks=tasks, seconds=clock.seconds)

    def _compute(
        self, episodes: EpisodeBatch, valid: Tensor, theta: Tensor, clock: _Clock
    ) -> tuple[Tensor, TaskRecord]:
        problem = self.problem(episodes, theta, clock.lap)
        inner, meta = self.algorithm.meta_gradient(problem)
        solver = getattr(self.algorithm, "solver", None)
        exclude = getattr(solver, "on_negative_curvature", "truncate") == "exclude"
        outcome = task_outcome(inner, meta, valid, exclude)
        own = [meta.own[name].reshape(len(valid), -1) for name in self.own]
        rows = torch.cat([meta.gradient, *own], dim=1) if own else meta.gradient
        rows = torch.where((outcome == int(TaskOutcome.OK))[:, None], rows, 0.0)
        return rows, TaskRecord.of(outcome, inner, meta, problem.query_accuracy(), problem.anchor)

    def _preflight_where_finite(self, episodes: EpisodeBatch) -> None:
        """With the first good task that overflows nowhere: what is bad about the others is said task by task."""
        usable, valid = self.usable(episodes)
        episodes = usable.chosen(valid)
        for t in range(len(episodes)):
            if can_be_tried(self.functional, episodes.support_x[t : t + 1], episodes.key[t : t + 1]):
                self.preflight(episodes[t : t + 1])
                return

    def _support_outputs(self, episode: EpisodeBatch) -> Tensor:
        with torch.no_grad():
            return self.functional.predict(self.functional.parameters()[None], episode.support_x, episode.key)

    def _outputs(self, episodes: EpisodeBatch) -> int | None:
        """Number of classes the model tells apart, by which labels are checked; None where targets are no labels."""
        if episodes.support_y.is_floating_point():
            return None
        if self._classes is None:
            with torch.no_grad():
                params = self.functional.parameters().unsqueeze(0)
                self._classes = self.functional.predict(params, episodes.support_x[:1]).shape[-1]
        return self._classes


class _Clock:
    """Seconds by phase, with the queue of computations drained at each lap so that the split is true."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # not the device, whose reductions go on
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
