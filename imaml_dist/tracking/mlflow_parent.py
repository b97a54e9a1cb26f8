"""An MLflow run that others are children of: a sweep above its trials, or repeats above their seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from imaml_dist.tracking.mlflow_link import MlflowLink, RunFacts


class MlflowParent:
    """The parent of runs whose directories lie in one folder.

    Its id is remembered in `mlflow.json` of that folder, so the same command again goes on with the same run; and because that
    file is there, runs within go to the same store (`mlflow_link.default_uri`). A child is told its parent's id
    (`RunFacts.parent`), or is adopted at the end if the server was away when it began.

    Args:
        folder: of the sweep or the repeats; exists.
        facts: sent when the run is created.
    """

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        self._facts = facts
        self._link = MlflowLink(folder)
        self._link.remember()
        self._again = "run the same command again when the server is back"

    @property
    def run_id(self) -> str | None:
        """For `RunFacts.parent`; None as long as the server was never there."""
        return self._link.run_id or None

    @property
    def identity(self) -> dict[str, str] | None:
        """`{uri, run_id}` for people to find the run by; None while it does not exist."""
        return self._link.identity

    def begin(self, timeout: float = 20.0) -> str:
        """Have the run there, RUNNING.

        Returns:
            Its id.

        Raises:
            TrackingError: the server is away. Go on without; `close` makes up for it.
        """
        self._link.insist(lambda: self._link.open(self._facts), timeout, self._again)
        return self._link.run_id

    def close(
        self,
        status: str,
        children: Sequence[Path] = (),
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Sequence[Path] = (),
        figures: Sequence[Path] = (),
        timeout: float = 20.0,
    ) -> None:
        """Adopt the children that do not know their parent, send what the whole came to, and its final status.

        Args:
            status: FINISHED, FAILED or KILLED.
            children: run directories; one without an MLflow run is left out.
            metrics: of the whole. Sent again unchanged they stand there once.
            tags: added to those of the run.
            artifacts: files; those that do not exist are left out.
            figures: pictures, kept under `figures`.
            timeout: seconds to go on trying.

        Raises:
            TrackingError: the server did not take everything.
        """

        def send_all() -> None:
            from mlflow.entities import Metric

            self._link.open(self._facts)
            for child in children:
                MlflowLink(child).adopt(self._link.run_id)
            sent = dict(metrics or {})
            if self._link.recall("ended") is None or self._link.recall("metrics") != sent:
                self._link.remember(
                    ended=int(time.time() * 1000), metrics=sent
                )  # with a time of their own they are the newest
            stamp = int(self._link.recall("ended"))
            points = [Metric(key, float(value), stamp, 0) for key, value in (metrics or {}).items()]
            for begin in range(0, len(points), 1000):
                self._link.client.log_batch(self._link.run_id, metrics=points[begin : begin + 1000])
            for key, text in (tags or {}).items():
                self._link.client.set_tag(self._link.run_id, key, text)
            self._link.upload(artifacts)
            self._link.upload(figures, "figures")
            self._link.client.set_terminated(self._link.run_id, status=status)

        self._link.insist(send_all, timeout, self._again)
