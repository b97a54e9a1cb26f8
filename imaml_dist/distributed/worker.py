"""The training loop of one worker: the same code for one process, for many, and for Ray actors.

Every worker holds the whole meta-state and steps it alike (`meta_step`); rank 0 writes metrics and checkpoints. When the group
is lost, what a worker remembers lets the next group go on where this one ended (`memory`).
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property

import torch

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.frozen import FrozenTasks
from imaml_dist.data.philox import SPEC_VERSION
from imaml_dist.distributed import schedules
from imaml_dist.distributed.build import (
    make_learner,
    make_source,
    make_validation_source,
    open_dataset,
    prepare_process,
    read_ahead,
)
from imaml_dist.distributed.comparison import COLUMNS, Comparison
from imaml_dist.distributed.giving_up import not_stuck
from imaml_dist.distributed.group import Group, first_rank_decides
from imaml_dist.distributed.memory import Memory
from imaml_dist.distributed.meta_step import MetaStep
from imaml_dist.distributed.meta_test import meta_test, shared_accuracy
from imaml_dist.distributed.nodes import COLUMNS as OF_NODES
from imaml_dist.distributed.nodes import Nodes
from imaml_dist.distributed.resumption import resume
from imaml_dist.distributed.stop import Stop
from imaml_dist.distributed.traffic import Traffic
from imaml_dist.errors import StorageError
from imaml_dist.tracking import metrics_file
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.outer import make_optimizer
from imaml_dist.training.profile import StepProfile
from imaml_dist.training.resumable import fixed_fields
from imaml_dist.training.run_directory import WRITER_WAIT_S, RunDirectory
from imaml_dist.training.state import Best, MetaState
from imaml_dist.training.writer import RunWriter

COMPUTING = ("seconds_data", "seconds_inner", "seconds_query", "seconds_solve")
"""What a rank does by itself in a meta-step."""


class Worker:
    """One rank of a training run.

    Args:
        config: resolved configuration.
        run: the run's directory, begun, on storage that all ranks share.
        group: the workers.
        memory: what this process remembers of the run from a group that was lost.
        after: why that group was lost, for the record.

    Attributes:
        save_now: set it, from any thread of any rank, to have a checkpoint at the end of the step.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        run: RunDirectory,
        group: Group,
        memory: Memory | None = None,
        after: str | None = None,
    ) -> None:
        prepare_process(config)
        self.config, self.run, self.group = config, run, group
        self.dataset = open_dataset(config)
        self.train_source = make_source(config, self.dataset, "train")
        self.val_source = make_validation_source(config, self.dataset)
        self.learner: MetaLearner = make_learner(config, self.train_source.image_shape)
        learned = meta_parameters(self.learner)
        drawn_from = {"dataset": self.dataset.index.fingerprint, "drawing rules": SPEC_VERSION}
        if isinstance(self.val_source, FrozenTasks):
            drawn_from["frozen tasks"] = self.val_source.sha256
        self.state = MetaState(
            learned,
            make_optimizer(learned, config.outer),
            drawn_from,
            fixed_fields(config),
            cap=schedules.first_cap(config.algorithm),
        )
        self.save_now = False
        self._memory, self._after = memory, after
        self._record: metrics_file.Record | None = None
        self._comparison: Comparison | None = None  # once the loop has begun
        self._saved = time.monotonic()
        self._saving = False
        self._traffic = Traffic(self.dataset.cached)
        watch = config.run.profile > 0 and group.rank == 0
        self._profile = StepProfile(config.run.profile, run) if watch else None

    def run_to_end(self) -> Stop:
        """Train until the configured end or a request to stop, then meta-test unless interrupted.

        The final state is in the newest checkpoint, the result of the meta-test in `evaluation.json`.

        Raises:
            TrainingError: too many steps in a row were skipped.
            StorageError: the last checkpoint or the profile cannot be written, or other workers still write into the run directory.
            CheckpointError: no checkpoint of an earlier start verifies, or the warm start does not fit.
            ConfigError: there is nothing to begin a warm start with.
            PeerLostError: another rank is gone; `memory` is what the next group begins with.
        """
        with ExitStack() as stack:
            stack.callback(self.dataset.close)
            # A rank 0 on a machine that was cut off holds the lock until it has waited in vain for the others.
            wait = max(WRITER_WAIT_S, self.config.run.collective_timeout)
            if self.group.rank == 0 and not stack.enter_context(self.run.writing(wait)):
                raise self.run.is_written_to()
            stop = self._train()
            if stop is not Stop.INTERRUPTED and self.config.evaluate.tasks:
                whole = meta_test(self.config, self.run, self.group, self.dataset)
                stop = stop if whole else Stop.INTERRUPTED
            self._write_profile()  # last of all: it takes long, and no other rank waits for this one any more
        return stop

    def memory(self) -> Memory | None:
        """What this process knows of the run, now that its group is lost: what all had agreed on, if they do not any more."""
        if self._comparison is None:
            return self._memory
        return self._comparison.last_agreed or replace(self._as_memory(), doubted=self._comparison.doubted)

    def _as_memory(self) -> Memory:
        return Memory(self.state.tensors(), self.state.facts(), self._record)

    def _train(self) -> Stop:
        taken = resume(self.config, self.run, self.group, self.learner, self.state, self._memory, self._after)
        # What was not taken is not to be trusted by a later group either.
        self._record, self._memory = (None, None) if taken is None else (taken.record, self._memory)
        doubted = None if self._memory is None else self._memory.doubted
        self._comparison = Comparison(self.group.rank, self.state, self._as_memory, doubted)
        self._nodes = Nodes(self.group, self.config.tracking.system_every, self.config.run.device == "cuda")
        pen = RunWriter(self.run, self.config.run.keep) if self.group.rank == 0 else None
        try:
            stop = self._steps(pen)
            first_rank_decides(self.group, lambda: _closed(pen))
        finally:
            with suppress(StorageError):  # has been told, or there is something worse to tell
                _closed(pen)
        return stop

    def _steps(self, pen: RunWriter | None) -> Stop:
        began, earlier = time.monotonic(), self.state.seconds
        # The last step of a lost group is ended again: who knows how far its writer had come.
        stop = self._agree() if self._record is None else self._end_step(self._record, pen, again=True)
        stop = Stop.PLATEAU if stop is Stop.NOT_YET and self._on_plateau() else stop
        while stop is Stop.NOT_YET:
            deal = self._meta.deal
            with read_ahead(self.config, self.train_source, self._meta.requests()) as self._episodes:
                while stop is Stop.NOT_YET and self._meta.deal is deal:
                    self._record = self._observed_step()
                    not_stuck(self.config.run, self.run, self.state)
                    self.state.seconds = earlier + time.monotonic() - began
                    stop = self._end_step(self._record, pen)
        return stop

    def _end_step(self, record: metrics_file.Record, pen: RunWriter | None, again: bool = False) -> Stop:
        """What follows a committed meta-step: a word with the others, validation, metrics, a checkpoint; may be done again."""
        assert self._comparison is not None
        stop = self._agree(None if again else record)
        if self.state.step % self.config.validation.every == 0 or stop in (Stop.STEPS, Stop.SECONDS):
            self._validate(record)
            stop = Stop.PLATEAU if stop is Stop.NOT_YET and self._on_plateau() else stop
        kept = self._is_kept(stop)
        agreed = self._agreed_copy() if kept or self.state.step % self.config.run.compare_every == 0 else None
        if pen is not None:
            self._write(record, agreed if kept else None, pen)
        if agreed is not None:
            self._comparison.begin(agreed)
        if self.state.step % self.config.run.compare_every == 0:
            self._meta.deal_anew()
        return stop

    def _is_kept(self, stop: Stop) -> bool:
        """Whether there is to be a checkpoint of this step; the same on every rank."""
        step = self.state.step
        due = self._saving or step % self.config.run.checkpoint_every == 0 or self.state.best.step == step
        return due or stop is not Stop.NOT_YET

    def _agreed_copy(self) -> Memory:
        """A copy of the state, which is that of all ranks."""
        assert self._comparison is not None
        copied = self._comparison.copy()
        rows = self.group.gather(torch.tensor(self._comparison.told(), dtype=torch.float64))
        self._comparison.judge([row.tolist() for row in rows])
        return copied

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

    def _on_plateau(self) -> bool:
        """The same on every rank."""
        return self.config.validation.on_plateau(self.state.step, self.state.best.step)

    def _agree(self, record: metrics_file.Record | None = None) -> Stop:
        """The opinion of all about the end. What all have done and asked of storage since the last time, and how busy their machines
        are, is added to the record.

        A request of any rank to save now becomes one of all.
        """
        assert self._comparison is not None
        computing = sum((record or {}).get(phase, 0.0) for phase in COMPUTING)
        asked, self.save_now = self.save_now or self._is_long_ago(), False
        said = [
            int(self._should_stop()),
            int(asked),
            computing,
            *self._comparison.told(),
            *self._nodes.told(),
            *self._traffic.since_last(),
        ]
        rows = [row.tolist() for row in self.group.gather(torch.tensor(said, dtype=torch.float64))]
        self._comparison.judge([row[3:] for row in rows])
        self._saving = any(row[1] for row in rows)
        if record is not None:
            record |= self._nodes.metrics([row[3 + COLUMNS :][:OF_NODES] for row in rows])
            record |= self._traffic.summed([row[3 + COLUMNS + OF_NODES :] for row in rows])
        if record is not None and self.group.world > 1:
            times = [row[2] for row in rows]
            self._meta.took(times)
            slowest = times.index(max(times))
            record |= {"seconds_fastest_rank": min(times), "seconds_slowest_rank": max(times), "slowest_rank": slowest}
        return Stop(int(max(row[0] for row in rows)))

    def _is_long_ago(self) -> bool:
        """Whether rank 0 has not had a checkpoint written for too many minutes."""
        most = self.config.run.checkpoint_minutes
        return self.group.rank == 0 and most is not None and time.monotonic() - self._saved >= 60 * most

    @cached_property
    def _meta(self) -> MetaStep:
        return MetaStep(self.config, self.learner, self.state, self.group, self._note)

    def _note(self) -> None:
        if self._comparison is not None:
            self._comparison.note()

    def _observed_step(self) -> metrics_file.Record:
        """A meta-step, watched by rank 0 if that was asked for."""
        if self._profile is None:
            return self._meta_step(self.state.step)
        return self._profile.around(lambda: self._meta_step(self.state.step))

    def _meta_step(self, step: int) -> metrics_file.Record:
        return self._meta.take(step, self._episodes)

    def _write_profile(self) -> None:
        """What was found by watching, if all steps to be watched have been taken."""
        if self._profile is None or not self._profile.whole:
            return
        run = self.config.run
        episode = self.train_source.episodes(self.state.step, range(1)).to(run.device)
        self._profile.write(self._profile.result(self.learner, episode, self._meta.tasks, run.threads))

    def _validate(self, record: metrics_file.Record) -> None:
        """Add the validation accuracy to the record, and note the step if it is the best so far."""
        if self.val_source is None:
            return
        schedules.follow(
            self.config.algorithm, self.learner, self.state
        )  # as the checkpoint of this step will be tested
        result = shared_accuracy(self.config, self.group, self.learner, self.val_source, self.config.validation.tasks)
        record |= {"val_accuracy": result.mean, "val_ci95": result.ci95}
        if result.inductive is not None:
            record |= {"val_accuracy_inductive": result.inductive.mean, "val_ci95_inductive": result.inductive.ci95}
        if result.mean > self.state.best.accuracy:
            self.state.best = Best(self.state.step, result.mean)

    def _write(self, record: metrics_file.Record, kept: Memory | None, pen: RunWriter) -> None:
        if pen.failures:
            record |= {"failed_writes": pen.failures}
        pen.record(record)
        if kept is not None:
            pen.checkpoint(kept.step, kept.tensors, kept.facts, self.state.best.step)
            self._saved = time.monotonic()


def _closed(pen: RunWriter | None) -> int:
    """Everything written, if this rank is the one that writes."""
    if pen is not None:
        pen.close()
    return 0
