"""The link between a folder and its MLflow run: which server, which run, and what `mlflow.json` remembers of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imaml_dist.errors import TrackingError
from imaml_dist.storage.local import atomic_write, without_secrets

STATE = "mlflow.json"
KEY, PARENT = "imaml.key", "mlflow.parentRunId"

_NOT_IN_NAMES = re.compile(r"[^\w./ :-]")
_FORGOTTEN: dict[str, Any] = {"run_id": "", "key": "", "described": False, "last_step": -1}
_LARGE_FILES_TIMEOUT_S = 300
_DEEPEST = 4
"""Folders between a run of one of several seeds of a trial and the sweep."""


@dataclass(frozen=True)
class RunFacts:
    """What a run tells MLflow about itself.

    Attributes:
        experiment: name of the MLflow experiment.
        name: of the run.
        params: flattened configuration; sent once, for MLflow never changes them. What a resumed run has changed becomes tags.
        tags: git revision, versions, cluster and the like; sent at every start.
        dataset: `{name, digest, source}`; empty for a run that others are children of.
        dataset_tags: for example way and shot.
        files: sent at every start.
        parent: id of the MLflow run that this one is a child of.
    """

    experiment: str
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    dataset: Mapping[str, str] = field(default_factory=dict)
    dataset_tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    parent: str | None = None


def default_uri(home: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or sqlite in `mlflow.db` in the folder of the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').as_posix()}"


def home_of(folder: Path) -> Path:
    """The folder that has this and other runs: the one around it.

    A run within a sweep, or one of several seeds, goes where that goes: its folder lies in one that has an MLflow run of its own.
    """
    found = folder.resolve()
    near = list(found.parents)[:_DEEPEST]
    return next((above for above in reversed(near) if (above / STATE).is_file()), found).parent


def cleaned(name: str) -> str:
    """A name of a parameter or metric without the characters that MLflow refuses."""
    return _NOT_IN_NAMES.sub("_", name)


class MlflowLink:
    """A folder's run in MLflow.

    Args:
        folder: must exist.
        home: the folder that has this and other runs, if it is another one than that of `home_of`.

    Attributes:
        uri: of the server or the database, with its password.
    """

    def __init__(self, folder: Path, home: Path | None = None) -> None:
        self._home = home or home_of(folder)
        self.uri = default_uri(self._home)
        self._file = folder / STATE
        self._state = _FORGOTTEN | {"uri": without_secrets(self.uri)}
        if self._file.is_file():
            remembered: dict[str, Any] = json.loads(self._file.read_bytes())
            if remembered["uri"] == self._state["uri"]:
                self._state |= remembered
        self._client: Any = None
        self._opened = False
        self._remembering = threading.Lock()

    @property
    def run_id(self) -> str:
        """Of the MLflow run; empty while there is none."""
        return str(self._state["run_id"])

    @property
    def identity(self) -> dict[str, str] | None:
        """`{uri, run_id}` for people to find the run by; None while it does not exist."""
        return {"uri": without_secrets(self.uri), "run_id": self.run_id} if self.run_id else None

    def recall(self, name: str) -> Any:
        """What was remembered under a name; None if nothing was."""
        return self._state.get(name)

    def remember(self, **changes: Any) -> None:
        """Keep facts in the folder, whole or not at all."""
        with self._remembering:  # the thread that sends and the one that closes both do
            self._state |= changes
            atomic_write(self._file, json.dumps(self._state).encode())

    @property
    def client(self) -> Any:
        """MLflow's own client; made at the first use, for the import takes seconds."""
        if self._client is None:
            self._client = _connect(self.uri)
        return self._client

    def open(self, facts: RunFacts) -> None:
        """Have the run there, RUNNING and described: created if there is none yet, else the same as before.

        What fails on the way may be done again: an answer that was lost does not make a second run.
        """
        if self._opened:
            return
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self._create(facts)
        if not self._state["described"]:
            self._describe(facts)
        else:
            self._describe_anew(facts)
        for file in facts.files:
            if file.is_file():
                self.client.log_artifact(self.run_id, str(file))
        self._opened = True

    def knock(self) -> None:
        """Ask for next to nothing; raises whatever the client raises where nobody answers."""
        self.client.search_experiments(max_results=1)

    def adopt(self, parent: str) -> None:
        """Make the run a child of another one."""
        if self.run_id and self._state.get("parent") != parent:
            self.client.set_tag(self.run_id, PARENT, parent)
            self.remember(parent=parent)

    def upload(self, files: Sequence[Path], below: str | None = None) -> None:
        """Send files; those that do not exist are left out. Large ones may take minutes."""
        with _patience():
            for file in files:
                if file.is_file():
                    self.client.log_artifact(self.run_id, str(file), below)

    def upload_folder(self, folder: Path, below: str) -> None:
        """Send all that lies in a folder."""
        with _patience():
            self.client.log_artifacts(self.run_id, str(folder), below)

    def insist(self, act: Callable[[], None], timeout: float, again: str) -> None:
        """Do something, again and again until MLflow takes it.

        Raises:
            TrackingError: it did not within `timeout` seconds; the message ends with `again`, what to do.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return act()
            except Exception as error:  # whatever the client's transport and store raise
                if time.monotonic() > deadline:
                    # The client's own error quotes the address with its password.
                    raise self.unsent(self.explained(error), again) from None
                time.sleep(1.0)

    def unsent(self, trouble: str, again: str) -> TrackingError:
        """What to raise where something could not be sent."""
        return TrackingError(
            f"MLflow at {without_secrets(self.uri)} did not take everything ({trouble}); nothing is lost, {again}"
        )

    def explained(self, error: Exception) -> str:
        """The client's error without user name and password."""
        secret = urlsplit(self.uri).netloc.rpartition("@")[0]
        text = f"{type(error).__name__}: {error}"
        return text.replace(f"{secret}@", "") if secret else text

    def _create(self, facts: RunFacts) -> None:
        experiment = self._experiment(facts.experiment)
        made: list[Any] = []
        if self._state["key"]:  # asked for before, and no answer was heard
            made = self.client.search_runs([experiment], f"tags.`{KEY}` = '{self._state['key']}'")
        else:
            self.remember(key=uuid.uuid4().hex)
        if not made:
            tags = dict(facts.tags) | {KEY: self._state["key"]} | ({PARENT: facts.parent} if facts.parent else {})
            made = [self.client.create_run(experiment, run_name=facts.name, tags=tags)]
        self.remember(run_id=made[0].info.run_id, parent=facts.parent)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self.uri.startswith("sqlite:"):
            location = (self._home / "mlartifacts" / _as_folder(name)).as_uri()
        return str(self.client.create_experiment(name, artifact_location=location))

    def _describe(self, facts: RunFacts) -> None:
        """Send parameters and data set; may be repeated."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        params = [Param(key, value) for key, value in _as_params(facts).items()]
        for begin in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[begin : begin + 100])
        if facts.dataset:
            data = facts.dataset
            entity = Dataset(
                name=data["name"],
                digest=data["digest"][:36],
                source_type="s3" if data["source"].startswith("s3://") else "local",
                source=json.dumps({"uri": data["source"]}),
            )
            tags = {"mlflow.data.context": "meta-train", **facts.dataset_tags}
            given = DatasetInput(dataset=entity, tags=[InputTag(key, value) for key, value in tags.items()])
            self.client.log_inputs(self.run_id, [given])
            self.client.log_batch(self.run_id, tags=[RunTag("dataset_fingerprint", data["digest"])])
        self.remember(described=True)

    def _describe_anew(self, facts: RunFacts) -> None:
        """What a later start has changed: tags, and under tags the parameters that differ."""
        from mlflow.entities import RunTag

        found = self.client.get_run(self.run_id).data
        before = {key: found.tags.get(f"now.{key}", first) for key, first in found.params.items()}
        changed = {f"now.{key}": value for key, value in _as_params(facts).items() if before.get(key) != value}
        tags = [RunTag(key, value[:5000]) for key, value in (dict(facts.tags) | changed).items()]
        for begin in range(0, len(tags), 100):
            self.client.log_batch(self.run_id, tags=tags[begin : begin + 100])
        if facts.parent:
            self.adopt(facts.parent)


def _as_folder(name: str) -> str:
    """An experiment's name as that of one folder; what had to be changed for that ends in a hash, so that no two are the same."""
    plain = re.sub(r"[^\w. -]", "_", name).lstrip(".")[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _as_params(facts: RunFacts) -> dict[str, str]:
    return {cleaned(key): str(value)[:6000] for key, value in facts.params.items()}


def _connect(uri: str) -> Any:
    # Few quick tries here: who calls tries again, and must notice quickly that a run ends.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import logging

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def _patience() -> Iterator[None]:
    """A server that puts a large file into object storage answers only when it is there."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(_LARGE_FILES_TIMEOUT_S, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
