"""One MLflow run, fed from `metrics.jsonl` by a thread: a slow or absent server never delays a meta-step.

The metrics file is the spool. What has been acknowledged is remembered in `mlflow.json` beside it, so a resumed run
goes on in the same MLflow run, and `imaml mlflow-sync` sends what is left.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imaml_dist.errors import TrackingError
from imaml_dist.storage.local import atomic_write, without_secrets
from imaml_dist.tracking.metrics_file import Follower, Record

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
"""Names in MLflow. Others: `seconds_x` -> `time/x`, `algorithm_x` -> `algorithm/x`, all else -> `outcome/...`."""

_BATCH = 1000
_NOT_IN_NAMES = re.compile(r"[^\w./ :-]")
_POLL_S, _LONGEST_WAIT_S = 2.0, 8.0


@dataclass(frozen=True)
class RunFacts:
    """What a run tells MLflow about itself, once.

    Attributes:
        experiment: name of the MLflow experiment.
        name: of the run.
        params: flattened configuration.
        tags: git revision, versions, fingerprint and the like.
        dataset: `{name, digest, source}`.
        dataset_tags: for example way and shot.
    """

    experiment: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    dataset: Mapping[str, str]
    dataset_tags: Mapping[str, str] = field(default_factory=dict)


def default_uri(home: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or sqlite in `mlflow.db` in the folder of the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').as_posix()}"


class MlflowRun:
    """The link between a run directory and its MLflow run.

    Args:
        run: run directory, in which this process works.
        metrics: its `metrics.jsonl`.
        facts: sent when the MLflow run is created.
        url: what people know the run directory by, if that is another name.
        home: the folder that has this and other runs, if it is not the one around it.
    """

    def __init__(
        self, run: Path, metrics: Path, facts: RunFacts, url: str | None = None, home: Path | None = None
    ) -> None:
        self._run, self._facts, self._url = run, facts, url or str(run)
        self._home = home or run.resolve().parent
        self._uri = default_uri(self._home)
        self._state_file = run / "mlflow.json"
        self._state: dict[str, Any] = self._load_state()
        self._follower = Follower(metrics, after_step=self._state["last_step"])
        self._pending: list[Record] = []
        self._client: Any = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.trouble: str | None = None

    @property
    def identity(self) -> dict[str, str] | None:
        """`{uri, run_id}` for people to find the run by; None while it does not exist."""
        run_id = self._state["run_id"]
        return {"uri": without_secrets(self._uri), "run_id": run_id} if run_id else None

    def start(self) -> None:
        """Begin to send in the background."""
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def close(
        self,
        status: str,
        artifacts: Sequence[Path] = (),
        results: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        timeout: float = 20.0,
    ) -> None:
        """Send the rest, the results of the run, its artifacts and its final status (FINISHED, FAILED, KILLED).

        Raises:
            TrackingError: the server did not take everything within `timeout` seconds; nothing is lost.
        """
        self._closing.set()
        deadline = time.monotonic() + timeout
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise self._unsent()
        while True:
            try:
                self._send()
                run_id = self._state["run_id"]
                for key, value in (results or {}).items():
                    self._client.log_metric(run_id, key, value)
                for key, text in (tags or {}).items():
                    self._client.set_tag(run_id, key, text)
                for artifact in artifacts:
                    if artifact.is_file():
                        self._client.log_artifact(run_id, str(artifact))
                self._client.set_terminated(run_id, status=status)
                return
            except Exception as error:  # whatever the client's transport and store raise
                self.trouble = self._explain(error)
                if time.monotonic() > deadline:
                    raise self._unsent() from None  # the client's own error quotes the address with its password
                time.sleep(1.0)

    def _unsent(self) -> TrackingError:
        return TrackingError(
            f"MLflow at {without_secrets(self._uri)} did not take everything ({self.trouble or 'no answer in time'}); nothing is lost, "
            f"send the rest with `imaml mlflow-sync {self._url}` when the server is back"
        )

    def _loop(self) -> None:
        wait = _POLL_S
        while not self._closing.wait(wait):
            try:
                self._send()
                self.trouble, wait = None, _POLL_S
            except Exception as error:  # tracking must never stop training; `close` reports what is left
                self.trouble, wait = self._explain(error), min(2 * wait, _LONGEST_WAIT_S)

    def _explain(self, error: Exception) -> str:
        """The client's error without user name and password."""
        secret = urlsplit(self._uri).netloc.rpartition("@")[0]
        text = f"{type(error).__name__}: {error}"
        return text.replace(f"{secret}@", "") if secret else text

    def _send(self) -> None:
        """Send what is new; raises whatever the client raises, and then the same records are sent again."""
        if self._client is None:
            self._client = self._connect()
            if self._state["run_id"]:
                self._client.update_run(self._state["run_id"], status="RUNNING")
        if not self._state["run_id"]:
            self._create()
        if not self._state["described"]:
            self._describe()
        self._pending += self._follower.poll()
        while self._pending:
            records: list[Record] = []
            count = 0
            for record in self._pending:
                count += len(record)
                if records and count > _BATCH:
                    break
                records.append(record)
            self._client.log_batch(self._state["run_id"], metrics=[m for r in records for m in _metrics(r)])
            self._pending = self._pending[len(records) :]
            self._save_state(last_step=records[-1]["step"])

    def _connect(self) -> Any:
        # Few quick tries here: the loop above is the retry, and it must notice quickly that a run ends.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        import logging

        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        return mlflow.MlflowClient(tracking_uri=self._uri)

    def _create(self) -> None:
        experiment = self._client.get_experiment_by_name(self._facts.experiment)
        if experiment is None:
            location = None
            if self._uri.startswith("sqlite:"):
                location = (self._home / "mlartifacts" / self._facts.experiment).as_uri()
            experiment_id = self._client.create_experiment(self._facts.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        created = self._client.create_run(experiment_id, run_name=self._facts.name, tags=dict(self._facts.tags))
        self._save_state(run_id=created.info.run_id)  # at once: whatever fails next must not create another run

    def _describe(self) -> None:
        """Send parameters and data set; may be repeated."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run_id = self._state["run_id"]
        params = [Param(_NOT_IN_NAMES.sub("_", key), str(value)[:6000]) for key, value in self._facts.params.items()]
        for begin in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[begin : begin + 100])
        data = self._facts.dataset
        source = json.dumps({"uri": data["source"]})
        kind = "s3" if data["source"].startswith("s3://") else "local"
        entity = Dataset(name=data["name"], digest=data["digest"][:36], source_type=kind, source=source)
        tags = [
            InputTag("mlflow.data.context", "meta-train"),
            *(InputTag(k, v) for k, v in self._facts.dataset_tags.items()),
        ]
        self._client.log_inputs(run_id, [DatasetInput(dataset=entity, tags=tags)])
        self._client.log_batch(run_id, tags=[RunTag("dataset_fingerprint", data["digest"])])
        self._save_state(described=True)

    def _load_state(self) -> dict[str, Any]:
        if self._state_file.is_file():
            state: dict[str, Any] = json.loads(self._state_file.read_bytes())
            if state["uri"] == without_secrets(self._uri):
                return state
        return {"uri": without_secrets(self._uri), "run_id": "", "described": False, "last_step": -1}

    def _save_state(self, **changes: Any) -> None:
        self._state |= changes
        atomic_write(self._state_file, json.dumps(self._state).encode())


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
    for prefix, group in (("seconds_", "time/"), ("algorithm_", "algorithm/")):
        if key.startswith(prefix):
            return _NOT_IN_NAMES.sub("_", group + key.removeprefix(prefix))
    return f"outcome/{key}"
