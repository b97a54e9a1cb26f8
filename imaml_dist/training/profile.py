"""Where the time of a meta-step goes: seconds and FLOPs by phase, beside what the machine can do, and a trace of one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from imaml_dist.algorithms.flops import flops_by_phase
from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.errors import StorageError
from imaml_dist.tasks.episode import EpisodeBatch
from imaml_dist.training.run_directory import RunDirectory

PHASES = ("data", "inner", "query", "solve", "reduce", "outer")
"""Phases of a meta-step as its record names them, `seconds_<phase>`."""

Record = dict[str, Any]


class StepProfile:
    """Watches some meta-steps of one worker: the first goes by, `steps` are timed, and one more is traced.

    Args:
        steps: >= 1.
        run: where the result is written, with `trace.json.gz`, which chrome://tracing and perfetto open.
    """

    def __init__(self, steps: int, run: RunDirectory) -> None:
        self._steps, self._run = steps, run
        self._seen = 0
        self._records: list[Record] = []
        self._trace: profile | None = None

    def around(self, meta_step: Callable[[], Record]) -> Record:
        """Take a meta-step, and note what its record says if it is one to be timed."""
        self._seen += 1
        if self._seen == self._steps + 2:
            return self._traced(meta_step)
        record = meta_step()
        if 1 < self._seen <= self._steps + 1:
            self._records.append(record)
        return record

    @property
    def whole(self) -> bool:
        """Whether all steps have been seen."""
        return self._trace is not None

    def write(self, result: Record) -> None:
        """Write the trace of a whole profile, and its result. It takes seconds: no other worker should wait for this one then.

        Raises:
            StorageError: they cannot be written.
        """
        assert self._trace is not None
        try:
            self._run.profile.mkdir(exist_ok=True)
            trace = self._run.profile / "trace.json.gz"
            self._trace.export_chrome_trace(str(trace))
            self._run.write_json(self._run.profile_file, result)
            self._run.share(self._run.profile_file, trace)
        except OSError as error:
            raise StorageError(
                f"{self._run.profile} cannot be written ({error}), but all steps and checkpoints are; free space and run the same "
                "command again to resume"
            ) from error

    def result(self, learner: MetaLearner, episodes: EpisodeBatch, tasks: int, threads: int) -> Record:
        """What was found.

        Args:
            learner: as trained.
            episodes: one or more tasks like those of the steps.
            tasks: how many of them this worker computes in a step.
            threads: of this worker.

        Returns:
            `{"steps", "tasks_per_step", "threads", "peak_gflops", "seconds_per_step", "phases": [{"phase", "seconds", "share",
            "gflop", "gflop_per_second", "of_peak"}, ...]}`: medians over the steps timed; the last phase, `other`, is what is left.
        """
        flops = flops_by_phase(learner, episodes)
        peak = measured_peak(episodes.support_x.device, learner.meta_parameters().dtype)

        def median(key: str) -> float:
            values = torch.tensor([record.get(key, 0.0) for record in self._records], dtype=torch.float64)
            return float(values.median())

        whole = median("seconds_step")
        seconds = {phase: median(f"seconds_{phase}") for phase in PHASES}
        seconds["other"] = max(0.0, whole - sum(seconds.values()))
        phases = []
        for phase, spent in seconds.items():
            gflop = flops.get(phase, 0) * tasks / 1e9
            rate = gflop / spent if spent else 0.0
            row = {"phase": phase, "seconds": spent, "share": spent / whole, "gflop": gflop}
            phases.append(row | {"gflop_per_second": rate, "of_peak": rate / peak})
        return {
            "steps": len(self._records),
            "tasks_per_step": tasks,
            "threads": threads,
            "peak_gflops": peak,
            "seconds_per_step": whole,
            "phases": phases,
        }

    def _traced(self, meta_step: Callable[[], Record]) -> Record:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as trace:
            record = meta_step()
        self._trace = trace
        return record


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """GFLOP/s of a product of two square matrices, the best of some: what this process can reach with its threads."""
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()
    return 2 * size**3 / min(once() for _ in range(repeats)) / 1e9
