"""One meta-step of one rank: adapt the tasks dealt to it, sum over all ranks, update; every rank ends with the same state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.algorithms.record import NO_SOLVE, TaskRecord
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.distributed import progress, schedules
from imaml_dist.distributed.chunks import Deal, chunks_of
from imaml_dist.distributed.group import Group
from imaml_dist.distributed.reduction import ExactSum, FastSum, gather_chunks, tree_sum
from imaml_dist.distributed.speeds import Speeds
from imaml_dist.tasks.episode import EpisodeBatch
from imaml_dist.tracking.metrics_file import Record
from imaml_dist.training.outer import clip_norm, is_usable, learning_rate
from imaml_dist.training.state import MetaState


class MetaStep:
    """Takes meta-steps.

    Args:
        config: resolved configuration.
        learner: with the parameters that `state` steps.
        state: the meta-state.
        group: the workers.
        before_update: called in each step when the sum is there and nothing has been made of it.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        learner: MetaLearner,
        state: MetaState,
        group: Group,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._learner, self._state, self._group = config, learner, state, group
        self._before_update = before_update
        self._chunks = chunks_of(config.run.tasks_per_step, config.run.chunk)
        self._speeds = Speeds(group.world, len(self._chunks))

    @property
    def deal(self) -> Deal:
        """Which rank computes which chunks, for now."""
        return self._speeds.deal

    def took(self, seconds: Sequence[float]) -> None:
        """How long every rank has computed in the last meta-step."""
        self._speeds.took(seconds)

    def deal_anew(self) -> None:
        """Give faster ranks more to do, if that pays; every rank decides alike, from equal times."""
        if self._config.run.deal == "speed":
            self._speeds.deal_anew()

    @property
    def _mine(self) -> list[range]:
        return [self._chunks[n] for n in self.deal[self._group.rank]]

    @property
    def tasks(self) -> int:
        """Tasks that this rank computes in a meta-step."""
        return sum(len(chunk) for chunk in self._mine)

    def requests(self) -> Iterator[tuple[int, range]]:
        """The (step, tasks) that this rank computes from the state's step on, in order, as long as the deal stays."""
        mine = self._mine
        return ((step, chunk) for step in range(self._state.step, self._config.run.steps) for chunk in mine)

    def take(self, step: int, episodes: Iterator[EpisodeBatch]) -> Record:
        """Compute, reduce and apply.

        Args:
            step: the state's next one.
            episodes: of `requests`, from here on.

        Returns:
            The step's line of metrics.

        Raises:
            PeerLostError: another rank is gone; nothing has been applied.
        """
        clock = time.perf_counter()
        seconds = {"data": 0.0, "inner": 0.0, "query": 0.0, "solve": 0.0}
        sums = ExactSum if self._config.run.reduction == "exact" else FastSum
        size = self._state.parameters.layout.size
        total, rows = sums(self._group, self.deal, self._empty(), size), []
        schedules.follow(self._config.algorithm, self._learner, self._state)
        varying = schedules.values(self._config.algorithm, self._state)
        for _ in self._mine:
            fetch = time.perf_counter()
            batch = next(episodes).to(self._config.run.device)
            seconds["data"] += time.perf_counter() - fetch
            with progress.computing():
                out = self._learner.task_gradients(batch)
            for phase, spent in out.seconds.items():
                seconds[phase] += spent
            total.add(tree_sum(out.rows))
            rows.append(out.tasks.to_rows())
        reduce = time.perf_counter()
        gradient, tasks = total.finish(), self._tasks(rows)
        seconds["reduce"] = time.perf_counter() - reduce

        outer = time.perf_counter()
        self._before_update()
        rate = learning_rate(self._config.outer, self._state.updates, self._config.run.steps)
        norm = self._apply(gradient, tasks, rate)
        self._state.ledger.commit(step, [int(code) for code in tasks.outcome.tolist()])
        seconds["outer"] = time.perf_counter() - outer
        elapsed = time.perf_counter() - clock
        return {
            "step": step,
            "time": time.time(),
            **_task_metrics(tasks),
            **self._state.parameters.describe(),
            **varying,
            "grad_norm": norm,
            "step_skipped": int(self._state.skipped_in_a_row > 0),
            "updates": self._state.updates,
            "lr": rate,
            "tasks_per_second": len(tasks.outcome) / elapsed,
            "seconds_step": elapsed,
            **{f"seconds_{phase}": value for phase, value in seconds.items()},
            "world_size": self._group.world,
            "chunks_fewest": min(map(len, self.deal)),
            "chunks_most": max(map(len, self.deal)),
        }

    def _empty(self) -> Tensor:
        """Of the type and the device of gradients."""
        return torch.empty(0, device=self._config.run.device, dtype=next(self._learner.model.parameters()).dtype)

    def _tasks(self, rows: list[Tensor]) -> TaskRecord:
        """What became of every task of the step."""
        shape = (self._config.run.chunk, len(TaskRecord.names()))
        mine = torch.stack(rows) if rows else self._empty().double().new_zeros(0, *shape)
        return TaskRecord.from_rows(gather_chunks(self._group, mine, self.deal).flatten(0, 1).cpu())

    def _apply(self, total: Tensor, tasks: TaskRecord, rate: float) -> float:
        """Step with the mean gradient of the accepted tasks, or skip the step: every rank decides alike, from equal facts."""
        accepted = int((tasks.outcome == int(TaskOutcome.OK)).sum())
        gradient, norm = clip_norm(total / max(1, accepted), self._config.outer.clip)
        if is_usable(accepted, len(tasks.outcome), norm):
            self._state.apply(gradient, rate)
            residuals = tasks.cg_residual[tasks.outcome == int(TaskOutcome.OK)]
            schedules.count(self._config.algorithm, self._state, float(residuals.mean()))
        else:
            self._state.skip()
        return norm if accepted else float("nan")


def _task_metrics(tasks: TaskRecord) -> Record:
    """Means over the accepted tasks, and counts of all outcomes."""
    ok = tasks.outcome == int(TaskOutcome.OK)

    def mean(values: Tensor) -> float:
        return float(values[ok].mean()) if bool(ok.any()) else float("nan")

    record: Record = {
        "meta_loss": mean(tasks.query_loss),
        "query_accuracy": mean(tasks.query_accuracy),
        "support_loss": mean(tasks.support_loss),
        "stationarity": mean(tasks.stationarity),
        "distance": mean(tasks.distance),
        "cosine": mean(tasks.cosine),
        "accepted": int(ok.sum()),
        "excluded": int((~ok).sum()),
    }
    if bool((tasks.cg_outcome != NO_SOLVE).any()):
        record |= {"cg_residual": mean(tasks.cg_residual), "cg_iterations": mean(tasks.cg_iterations)}
        record |= {f"cg_{o.name.lower()}": int((tasks.cg_outcome == int(o)).sum()) for o in Outcome}
    for code in TaskOutcome:
        if code is not TaskOutcome.OK and bool((tasks.outcome == int(code)).any()):
            record[f"excluded_{code.name.lower()}"] = int((tasks.outcome == int(code)).sum())
    return record
