"""One MLflow run, fed from `metrics.jsonl` by a thread: a slow or absent server never delays a meta-step.

The metrics file is the spool. What has been acknowledged is remembered in `mlflow.json` beside it, so a resumed run
goes on in the same MLflow run, and `imaml mlflow-sync` sends what is left. A point has the time of its meta-step, whenever it is
sent: one that a server took without being heard is sent again, and is the same point to MLflow, which keeps one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.metrics_file import Follower, Record
from imaml_dist.tracking.mlflow_link import MlflowLink, RunFacts, cleaned

if TYPE_CHECKING:
    from imaml_dist.tracking.mlflow_model import ModelFacts

NAMES = {
    "meta_loss": "meta/loss",
    "query_accuracy": "meta/accuracy",
    "grad_norm": "meta/grad_norm",
    "cosine": "meta/cosine_to_first_order",
    "lr": "meta/lr",
    "updates": "meta/updates",
    "support_loss": "inner/loss_support",
    "stationarity": "inner/stationarity",
    "distance": "inner/distance",
    "cg_residual": "cg/residual",
    "cg_iterations": "cg/iterations",
    "val_accuracy": "val/accuracy",
    "val_ci95": "val/accuracy_ci95",
    "val_accuracy_inductive": "val/accuracy_inductive",
    "val_ci95_inductive": "val/accuracy_inductive_ci95",
    "tasks_per_second": "tasks_per_second",
    "world_size": "world_size",
}
"""Names in MLflow. Others: `seconds_x` -> `time/x`, `algorithm_x` -> `algorithm/x`, `system/x` as it is, all else -> `outcome/...`."""

_BATCH = 1000
_POLL_S, _LONGEST_WAIT_S = 2.0, 8.0


def is_told(run: Path) -> bool:
    """Whether MLflow has heard all of a run, and how it ended."""
    return bool(MlflowLink(run).recall("told"))


def registered_as(run: Path) -> str | None:
    """Name of the registered model that a run was last made a version of; None if it never was."""
    name: str | None = MlflowLink(run).recall("registered")
    return name


class MlflowRun:
    """What a run directory tells its MLflow run.

    Args:
        run: run directory, in which this process works.
        metrics: its `metrics.jsonl`.
        facts: sent when the MLflow run is created, and what may have changed when it is gone on with.
        url: what people know the run directory by, if that is another name.
        home: the folder that has this and other runs, if it is another one than that of `mlflow_link.home_of`.

    Attributes:
        trouble: why nothing can be sent for now; None while all is well.
        registered: what became of the model that `close` was given; empty where none was.
    """

    def __init__(
        self, run: Path, metrics: Path, facts: RunFacts, url: str | None = None, home: Path | None = None
    ) -> None:
        self._metrics, self._facts, self._url = metrics, facts, url or str(run)
        self._link = MlflowLink(run, home)
        self._follower = Follower(metrics, after_step=self._link.recall("last_step"))
        self._pending: list[Record] = []
        self._begun = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.trouble: str | None = None
        self.registered = ""

    @property
    def identity(self) -> dict[str, str] | None:
        """`{uri, run_id}` for people to find the run by; None while it does not exist."""
        return self._link.identity

    @property
    def intended(self) -> str | None:
        """The status that `close` was last called with, whether or not MLflow heard of it; None while the run goes on."""
        status: str | None = self._link.recall("status")
        return status

    def start(self) -> None:
        """Begin to send in the background."""
        self._link.remember(status=None, told=False)
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(
        self,
        status: str,
        artifacts: Sequence[Path] = (),
        results: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        timeout: float = 20.0,
        figures: Sequence[Path] = (),
        model: ModelFacts | None = None,
    ) -> None:
        """Send the rest, the results of the run, its artifacts and its final status (FINISHED, FAILED, KILLED).

        Args:
            status: of the run.
            artifacts: files; those that do not exist are left out.
            results: metrics of the run as a whole, as of its last meta-step.
            tags: added to those of the run.
            timeout: seconds to go on trying.
            figures: pictures, kept under `figures`.
            model: to be registered.

        Raises:
            TrackingError: the server did not take everything within `timeout` seconds; nothing is lost.
        """
        again = f"send the rest with `imaml mlflow-sync {self._url}` when the server is back"
        self._closing.set()
        self._link.remember(status=status, told=False)
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise self._link.unsent(self.trouble or "no answer in time", again)

        def send_all() -> None:
            self._send()
            self._send_results(results or {})
            for key, text in (tags or {}).items():
                self._link.client.set_tag(self._link.run_id, key, text)
            self._link.upload(artifacts)
            self._link.upload(figures, "figures")
            if model is not None:
                from imaml_dist.tracking.mlflow_model import register

                self.registered = register(self._link, model)
                self._link.remember(registered=model.name)
            self._link.client.set_terminated(self._link.run_id, status=status)
            self._link.remember(told=True)

        self._link.insist(send_all, timeout, again)

    def _loop(self) -> None:
        wait = _POLL_S
        while not self._closing.wait(wait):
            try:
                self._send()
                self.trouble, wait = None, _POLL_S
            except Exception as error:  # tracking must never stop training; `close` reports what is left
                self.trouble, wait = self._link.explained(error), min(2 * wait, _LONGEST_WAIT_S)

    def _send(self) -> None:
        """Send what is new; raises whatever the client raises, and then the same records are sent again."""
        if self.trouble is not None:
            self._link.knock()  # a batch that nobody takes costs a meta-step of this process ten times as much
        self._link.open(self._facts)
        self._catch_up()
        self._begun = True
        self._pending += self._follower.poll()
        while self._pending:
            records: list[Record] = []
            count = 0
            for record in self._pending:
                count += len(record)
                if records and count > _BATCH:
                    break
                records.append(record)
            points = [point for record in records for point in _metrics(record)]
            if points:
                probe = (points[-1].key, points[-1].step)
                self._link.remember(sending={"key": probe[0], "step": probe[1]})
                self._link.client.log_batch(self._link.run_id, metrics=points)
            self._pending = self._pending[len(records) :]
            self._link.remember(last_step=records[-1]["step"], sending=None)

    def _catch_up(self) -> None:
        """Find out whether the last batch of a process that was killed arrived: MLflow takes batches as wholes.

        Its steps may have been done again since, with other times, which would make other points of them.
        """
        sending = self._link.recall("sending")
        if self._begun or sending is None:
            return
        history = self._link.client.get_metric_history(self._link.run_id, sending["key"])
        if any(point.step == sending["step"] for point in history):
            self._link.remember(last_step=sending["step"])
            self._follower.last_step = sending["step"]
        self._link.remember(sending=None)

    def _send_results(self, results: Mapping[str, float]) -> None:
        """As of the last meta-step, so that results that are sent twice stand there once."""
        from mlflow.entities import Metric

        last = metrics_file.last(self._metrics)
        step, timestamp = (int(last["step"]), int(last["time"] * 1000)) if last else (0, 0)
        metrics = [Metric(key, float(value), timestamp, step) for key, value in results.items()]
        if metrics:
            self._link.client.log_batch(self._link.run_id, metrics=metrics)


def _metrics(record: Record) -> list[Any]:
    from mlflow.entities import Metric

    step, timestamp = int(record["step"]), int(record["time"] * 1000)
    return [
        Metric(_name(key), float(value), timestamp, step)
        for key, value in record.items()
        if key not in ("step", "time") and value is not None
    ]


def _name(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    if key.startswith("system/"):
        return cleaned(key)
    for prefix, group in (("seconds_", "time/"), ("algorithm_", "algorithm/")):
        if key.startswith(prefix):
            return cleaned(group + key.removeprefix(prefix))
    return cleaned(f"outcome/{key}")
