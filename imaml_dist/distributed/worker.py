"""The training loop of one worker: the same code for one process, for many, and for Ray actors.

Every worker holds the whole meta-state and steps it alike. A meta-step is: adapt the tasks of the chunks dealt to this
rank, solve for their meta-gradients, sum over all ranks, step. Rank 0 writes metrics and checkpoints.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from enum import IntEnum

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.algorithms.record import NO_SOLVE, TaskRecord
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.data.philox import SPEC_VERSION
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process, read_ahead
from imaml_dist.distributed.chunks import chunks_of, dealt_to
from imaml_dist.distributed.meta_test import meta_test, shared_accuracy
from imaml_dist.distributed.reduction import Group, exact_sum, fast_sum, first_rank_decides, gather_chunks, tree_sum
from imaml_dist.distributed.traffic import Traffic
from imaml_dist.errors import CheckpointError, StorageError, TrainingError
from imaml_dist.storage.local import exclusive
from imaml_dist.tracking import metrics_file
from imaml_dist.training import checkpoints, warm_start
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.outer import clip_norm, is_usable, learning_rate, make_optimizer
from imaml_dist.training.profile import StepProfile
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import Best, MetaState, sha256_of

WRITER_WAIT_S = 60.0
"""How long to wait for the workers of a killed driver to be gone: Ray ends them, but not at once."""


class Stop(IntEnum):
    """Why the loop ended."""

    NOT_YET = 0
    STEPS = 1
    SECONDS = 2
    INTERRUPTED = 3


class Worker:
    """One rank of a training run.

    Args:
        config: resolved configuration.
        run: the run's directory, begun, on storage that all ranks share.
        group: the workers.
    """

    def __init__(self, config: ExperimentConfig, run: RunDirectory, group: Group) -> None:
        prepare_process(config)
        self.config, self.run, self.group = config, run, group
        self.dataset = open_dataset(config)
        self.train_source = make_source(config, self.dataset, "train")
        self.val_source = make_source(config, self.dataset, "val") if config.validation.tasks else None
        self.learner: MetaLearner = make_learner(config, self.train_source.image_shape)
        learned = meta_parameters(self.learner)
        drawn_from = {"dataset": self.dataset.index.fingerprint, "drawing rules": SPEC_VERSION}
        self.state = MetaState(learned, make_optimizer(learned, config.outer), drawn_from)
        self.chunks = chunks_of(config.run.tasks_per_step, config.run.chunk)
        self._mine = dealt_to(group.rank, group.world, len(self.chunks))
        self._traffic = Traffic(self.dataset.cached)
        watch = config.run.profile > 0 and group.rank == 0
        self._profile = StepProfile(config.run.profile, run) if watch else None

    def run_to_end(self) -> Stop:
        """Train until the configured end or a request to stop, then meta-test unless interrupted.

        The final state is in the newest checkpoint, the result of the meta-test in `evaluation.json`.

        Raises:
            TrainingError: too many steps in a row were skipped.
            StorageError: a checkpoint or the profile cannot be written, or other workers still write into the run directory.
            CheckpointError: no checkpoint of an earlier start verifies, or the warm start does not fit.
            ConfigError: there is nothing to begin a warm start with.
        """
        with ExitStack() as stack:
            stack.callback(self.dataset.close)
            if self.group.rank == 0 and not stack.enter_context(exclusive(self.run.writer_lock, WRITER_WAIT_S)):
                raise StorageError(
                    f"{self.run.path} is still written to by workers of an earlier start; end them and try again"
                )
            stop = self._train()
            if stop is not Stop.INTERRUPTED and self.config.evaluate.tasks:
                whole = meta_test(self.config, self.run, self.group, self.dataset)
                stop = stop if whole else Stop.INTERRUPTED
            self._write_profile()  # last of all: it takes long, and no other rank waits for this one any more
        return stop

    def _train(self) -> Stop:
        self._resume()
        requests = (
            (step, self.chunks[number])
            for step in range(self.state.step, self.config.run.steps)
            for number in self._mine
        )
        with read_ahead(self.config, self.train_source, requests) as self._episodes:
            return self._steps()

    def _steps(self) -> Stop:
        began, earlier = time.monotonic(), self.state.seconds
        stop, _ = self._agree(self._should_stop())
        while stop is Stop.NOT_YET:
            record = self._observed_step()
            self.state.seconds = earlier + time.monotonic() - began
            stop, traffic = self._agree(self._should_stop())
            record |= traffic
            if self.state.step % self.config.validation.every == 0 or stop in (Stop.STEPS, Stop.SECONDS):
                self._validate(record)
            self.state.seconds = earlier + time.monotonic() - began
            self._write(record, stop)
        return stop

    def _resume(self) -> None:
        """Take over the newest checkpoint that verifies, else the warm start, and make sure that all ranks begin alike."""
        rejected: list[str] = []
        warm: str | None = None
        found = first_rank_decides(self.group, lambda: self._newest_checkpoint(rejected))
        if found > 0:
            self.state.restore(*checkpoints.load(checkpoints.path_of(self.run.checkpoints, found)))
        elif self.config.warm_start.path is not None:
            warm = self._warm_start(self.config.warm_start.path)
        digest = int(sha256_of(self.state.tensors())[:15], 16)
        begun = self.group.gather(torch.tensor([os.getpid(), digest], dtype=torch.int64))
        if len({int(b[1]) for b in begun}) > 1:
            raise TrainingError(
                "the workers do not begin with the same meta-parameters; a model factory must build the same network everywhere "
                "(seed it from torch alone), and all workers must run on one kind of machine"
            )
        if self.group.rank == 0:
            # What lies beyond is damaged, or would be mistaken for newer than what this start writes.
            checkpoints.set_aside_after(self.run.checkpoints, found)
            metrics_file.rewind(self.run.metrics_file, self.state.step)
            facts = {"step": self.state.step, "world_size": self.group.world, "pids": [int(b[0]) for b in begun]}
            facts |= {"rejected": rejected} if rejected else {}
            facts |= {"warm_start": {"path": self.config.warm_start.path, "sha256": warm}} if warm else {}
            self.run.record_start(facts)

    def _warm_start(self, path: str) -> str:
        """Begin with the model of another run: every rank reads it for itself, and must read what rank 0 reads."""

        def read() -> str:
            return warm_start.load_into(self.learner.model, path, self.config.warm_start.skip)

        expected, digest = first_rank_decides(self.group, lambda: int(read()[:15], 16)), read()
        if int(digest[:15], 16) != expected:
            raise CheckpointError(
                f"warm_start.path: {path} is not the same for all workers; put it on storage that they share, "
                "and let no run write to it"
            )
        return digest

    def _newest_checkpoint(self, rejected: list[str]) -> int:
        loaded = checkpoints.load_newest(self.run.checkpoints, rejected.append)
        return 0 if loaded is None else checkpoints.step_of(loaded[1])

    def _should_stop(self) -> Stop:
        """This rank's opinion; `_agree` makes one of all."""
        if self.state.step >= self.config.run.steps:
            return Stop.STEPS
        if self.group.rank == 0 and self.run.stop_file.exists():
            return Stop.INTERRUPTED
        limit = self.config.run.max_seconds
        if limit is not None and self.group.rank == 0 and self.state.seconds >= limit:
            return Stop.SECONDS
        return Stop.NOT_YET

    def _agree(self, mine: Stop) -> tuple[Stop, metrics_file.Record]:
        """The opinion of all, and what all have asked of storage since the last time."""
        said = torch.tensor([int(mine), *self._traffic.since_last()], dtype=torch.float64)
        rows = [row.tolist() for row in self.group.gather(said)]
        return Stop(int(max(row[0] for row in rows))), dict(self._traffic.summed([row[1:] for row in rows]))

    def _observed_step(self) -> metrics_file.Record:
        """A meta-step, watched by rank 0 if that was asked for."""
        if self._profile is None:
            return self._meta_step(self.state.step)
        return self._profile.around(lambda: self._meta_step(self.state.step))

    def _write_profile(self) -> None:
        """What was found by watching, if all steps to be watched have been taken."""
        if self._profile is None or not self._profile.whole:
            return
        run = self.config.run
        mine = sum(len(self.chunks[number]) for number in self._mine)
        episode = self.train_source.episodes(self.state.step, range(1)).to(run.device)
        self._profile.write(self._profile.result(self.learner, episode, mine, run.threads))

    def _meta_step(self, step: int) -> metrics_file.Record:
        """Compute, reduce and apply one meta-step; returns its record."""
        clock = time.perf_counter()
        seconds = {"data": 0.0, "inner": 0.0, "query": 0.0, "solve": 0.0}
        gradients, rows = [], []
        for _ in self._mine:
            fetch = time.perf_counter()
            episodes = next(self._episodes).to(self.config.run.device)
            seconds["data"] += time.perf_counter() - fetch
            out = self.learner.task_gradients(episodes)
            for phase, spent in out.seconds.items():
                seconds[phase] += spent
            gradients.append(tree_sum(out.rows))
            rows.append(out.tasks.to_rows())

        reduce = time.perf_counter()
        size = self.state.parameters.layout.size
        device, count = self.config.run.device, len(self.chunks)
        dtype = next(self.learner.model.parameters()).dtype
        mine = torch.stack(gradients) if gradients else torch.zeros(0, size, device=device, dtype=dtype)
        facts = (
            torch.stack(rows)
            if rows
            else torch.zeros(0, self.config.run.chunk, len(TaskRecord.names()), device=device).double()
        )
        exact = self.config.run.reduction == "exact"
        total = exact_sum(self.group, mine, count) if exact else fast_sum(self.group, mine)
        tasks = TaskRecord.from_rows(gather_chunks(self.group, facts, count).flatten(0, 1).cpu())
        seconds["reduce"] = time.perf_counter() - reduce

        outer = time.perf_counter()
        rate = learning_rate(self.config.outer, self.state.updates, self.config.run.steps)
        norm = self._apply(total, tasks, rate)
        self.state.ledger.commit(step, [int(code) for code in tasks.outcome.tolist()])
        self._give_up_if_stuck()
        seconds["outer"] = time.perf_counter() - outer
        elapsed = time.perf_counter() - clock
        return {
            "step": step,
            "time": time.time(),
            **_task_metrics(tasks),
            **self.state.parameters.describe(),
            "grad_norm": norm,
            "step_skipped": int(self.state.skipped_in_a_row > 0),
            "updates": self.state.updates,
            "lr": rate,
            "tasks_per_second": len(tasks.outcome) / elapsed,
            "seconds_step": elapsed,
            **{f"seconds_{phase}": value for phase, value in seconds.items()},
            "world_size": self.group.world,
        }

    def _apply(self, total: Tensor, tasks: TaskRecord, rate: float) -> float:
        """Step with the mean gradient of the accepted tasks, or skip the step: every rank decides alike, from equal facts."""
        accepted = int((tasks.outcome == int(TaskOutcome.OK)).sum())
        gradient, norm = clip_norm(total / max(1, accepted), self.config.outer.clip)
        if is_usable(accepted, len(tasks.outcome), norm):
            self.state.apply(gradient, rate)
        else:
            self.state.skip()
        return norm if accepted else float("nan")

    def _give_up_if_stuck(self) -> None:
        skipped = self.state.skipped_in_a_row
        if skipped >= self.config.run.give_up_after:
            ended = ", ".join(f"{n} {name}" for name, n in self.state.ledger.outcomes_of_last(skipped).items())
            newest = max(checkpoints.steps(self.run.checkpoints), default=None)
            raise TrainingError(
                f"{skipped} meta-steps in a row were skipped, because more than half of their tasks were excluded or the gradient "
                f"was not finite (their tasks ended {ended}); the last good checkpoint is of step {newest}; try a smaller "
                "algorithm.inner.lr or outer.lr, or a larger run.give_up_after"
            )

    def _validate(self, record: metrics_file.Record) -> None:
        """Add the validation accuracy to the record, and note the step if it is the best so far."""
        if self.val_source is None:
            return
        result = shared_accuracy(self.config, self.group, self.learner, self.val_source, self.config.validation.tasks)
        record |= {"val_accuracy": result.mean, "val_ci95": result.ci95}
        if result.inductive is not None:
            record |= {"val_accuracy_inductive": result.inductive.mean, "val_ci95_inductive": result.inductive.ci95}
        if result.mean > self.state.best.accuracy:
            self.state.best = Best(self.state.step, result.mean)

    def _write(self, record: metrics_file.Record, stop: Stop) -> None:
        if self.group.rank != 0:
            return
        try:
            step = self.state.step
            due = (
                step % self.config.run.checkpoint_every == 0 or self.state.best.step == step or stop is not Stop.NOT_YET
            )
            metrics_file.append(self.run.metrics_file, record, durable=due)  # never a checkpoint ahead of its metrics
            if due:
                checkpoints.save(self.run.checkpoints, step, self.state.tensors(), self.state.facts())
                checkpoints.prune(self.run.checkpoints, self.config.run.keep, self.state.best.step)
        except OSError as error:
            raise StorageError(
                f"{self.run.path} cannot be written ({error}); free space and run the same command again to resume"
            ) from error


def _task_metrics(tasks: TaskRecord) -> metrics_file.Record:
    """Means over the accepted tasks, and counts of all outcomes."""
    ok = tasks.outcome == int(TaskOutcome.OK)

    def mean(values: Tensor) -> float:
        return float(values[ok].mean()) if bool(ok.any()) else float("nan")

    record: metrics_file.Record = {
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
