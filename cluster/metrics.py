"""A run's numbers among Ray's own metrics, for Prometheus: the command that trains exports them from the node it runs on.

    ray_imaml_tasks_per_second{run}, ray_imaml_meta_step{run}, ray_imaml_query_accuracy{run}, ray_imaml_val_accuracy{run}
    ray_imaml_step_seconds{run, phase}     of the last meta-step
    ray_imaml_tasks_total{run, outcome}    accepted, excluded, and why
    ray_imaml_solves_total{run, outcome}   how linear solves ended
    ray_imaml_restarts{run}

Only meta-steps that this command has seen are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = (
    "imaml_tasks_per_second",
    "imaml_meta_step",
    "imaml_query_accuracy",
    "imaml_val_accuracy",
    "imaml_step_seconds",
    "imaml_restarts",
    "imaml_tasks",
    "imaml_solves",
)
"""As Ray is told; it exports each behind `ray_`, and counters before `_total`."""

_GAUGES = {
    "imaml_tasks_per_second": ("tasks_per_second", "Tasks computed in a second, by all workers together."),
    "imaml_query_accuracy": ("query_accuracy", "Mean accuracy on the query images of the last meta-step's tasks."),
    "imaml_val_accuracy": ("val_accuracy", "Accuracy of the last validation."),
}
"""Name -> field of a meta-step's line of metrics, and what it is."""


class RunMetrics:
    """Exports what a run's lines of metrics say; needs a connection to Ray.

    Args:
        run: tells runs on one cluster apart.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._run = {"run": run}
        one, two = ("run",), ("run", "outcome")
        self._gauges = {name: Gauge(name, description=text, tag_keys=one) for name, (_, text) in _GAUGES.items()}
        self._step = Gauge("imaml_meta_step", description="Meta-steps taken.", tag_keys=one)
        self._seconds = Gauge("imaml_step_seconds", description="Of the last meta-step.", tag_keys=("run", "phase"))
        self._restarts = Gauge("imaml_restarts", description="Of the training loop.", tag_keys=one)
        self._tasks = Counter("imaml_tasks", description="Tasks, by what became of them.", tag_keys=two)
        self._solves = Counter("imaml_solves", description="Linear solves, by how they ended.", tag_keys=two)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take over one line of metrics."""
        for name, (field, _) in _GAUGES.items():
            if record.get(field) is not None:
                self._gauges[name].set(float(record[field]), self._run)
        self._step.set(int(record["step"]) + 1, self._run)
        for key, value in record.items():
            if value is None:
                continue
            if key.startswith("seconds_"):
                self._seconds.set(float(value), self._run | {"phase": key.removeprefix("seconds_")})
            elif key in ("accepted", "excluded") or key.startswith("excluded_"):
                self._count(self._tasks, key, value)
            elif key.startswith("cg_") and key not in ("cg_residual", "cg_iterations"):
                self._count(self._solves, key.removeprefix("cg_"), value)

    def restarted(self, times: int) -> None:
        """The training loop has begun so many times beyond the first."""
        self._restarts.set(times, self._run)

    def _count(self, counter: Any, outcome: str, number: float) -> None:
        if number > 0:  # Ray refuses to count nothing
            counter.inc(float(number), self._run | {"outcome": outcome})
