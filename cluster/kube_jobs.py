"""Runs as RayJobs of KubeRay: applied once however often one tries, followed through lost connections, deleted to end them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from cluster.jobs import POLL_S, TO_BE_REPEATED, JobHandle, JobState, JobStatus
from cluster.kuberay import NAME_LENGTH
from imaml_dist.errors import ClusterError, ImamlError, InputError, brief

MANAGER = "imaml"
"""Of the fields that are applied."""

IDENTITY = "imaml/identity"
"""Annotation: of the manifest; two submissions of one name must agree in it."""

DASHBOARD_PORT = 8265
ANSWER_S = (5.0, 30.0)
"""For a connection, and for an answer."""

PATIENCE_S = 60.0
"""How long Kubernetes may be away, or busy."""

LONGEST_PAUSE_S = 10.0
PASSING = (409, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""

_T = TypeVar("_T")


class KubeJobs:
    """The RayJobs of one namespace; see `Jobs`.

    Args:
        namespace: of Kubernetes.

    The cluster is that of kubectl's current context, and within a pod the pod's own.

    Raises:
        ClusterError: no cluster is chosen.
    """

    def __init__(self, namespace: str) -> None:
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ClusterError(
                "Kubernetes' client is not installed; pip install 'imaml_dist[k8s]', or pipe --k8s --dry-run into kubectl apply -f -"
            ) from error
        chosen, file = client.Configuration(), os.environ.get("KUBECONFIG")
        inside = "KUBERNETES_SERVICE_HOST" in os.environ and not (file or Path("~/.kube/config").expanduser().exists())
        try:
            if inside:
                config.load_incluster_config(client_configuration=chosen)
            else:
                config.load_kube_config(config_file=file, client_configuration=chosen)
        except Exception as error:  # of a file that anybody may have written
            raise ClusterError(
                f"no Kubernetes is chosen ({brief(error)}); kubectl config use-context NAME, or set KUBECONFIG"
            ) from error
        chosen.retries = False  # we try again ourselves, and longer
        api = client.ApiClient(chosen)
        self.namespace, self.address, self.options = namespace, str(chosen.host), f"--k8s --namespace {namespace}"
        # KubeRay asks the command to end, and does not wait for it.
        self.cancelling = "is deleted with its pods; submitting it again goes on from its last checkpoint"
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._where = {"group": "ray.io", "version": "v1", "namespace": namespace, "plural": "rayjobs"}

    def submit(self, manifest: Mapping[str, Any]) -> tuple[JobHandle, bool]:
        """Apply it, unless its job is there and has not failed. After one that failed or was deleted comes `<name>-2`, and so on.

        Args:
            manifest: a RayJob, in this namespace.

        Returns:
            The job, and whether it was not there before.

        Raises:
            InputError: the name is that of another configuration, or Kubernetes refuses the manifest.
            ClusterError: Kubernetes cannot be reached, or refuses.
        """
        identity = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        first = manifest["metadata"]["name"]
        for n in count(1):
            name = first if n == 1 else f"{first[: NAME_LENGTH - 4]}-{n}"
            found = self.find(name)
            if found is None:
                break
            if _state(found).status not in TO_BE_REPEATED:
                if found["metadata"].get("annotations", {}).get(IDENTITY) != identity:
                    raise InputError(
                        f"{name} is a RayJob of another configuration in namespace {self.namespace}; give this one another name"
                    )
                return KubeJob(self, name), False
        metadata = {**manifest["metadata"], "name": name}
        metadata["annotations"] = {**metadata.get("annotations", {}), IDENTITY: identity}
        # Applying is doing once what is asked for twice, so an answer that was lost does no harm.
        self.ask(
            lambda: self._objects.patch_namespaced_custom_object(
                **self._where,
                name=name,
                body={**manifest, "metadata": metadata},
                field_manager=MANAGER,
                force=True,
                _content_type="application/apply-patch+yaml",
                _request_timeout=ANSWER_S,
            )
        )
        return KubeJob(self, name), True

    def job(self, id: str) -> JobHandle:
        """See `Jobs`."""
        found = KubeJob(self, id)
        found.state()
        return found

    def all(self) -> list[tuple[str, JobState]]:
        """See `Jobs`."""
        listed = self.ask(lambda: self._objects.list_namespaced_custom_object(**self._where, _request_timeout=ANSWER_S))
        found = [(item["metadata"]["name"], _state(item)) for item in listed["items"]]
        return sorted(found, key=lambda one: one[1].started or 0.0)

    def find(self, name: str) -> dict[str, Any] | None:
        """The object of that name; None if there is none."""
        return self.ask(lambda: self._get(name))

    def delete(self, name: str) -> None:
        """Delete it with its cluster; nothing happens where there is none."""

        def act() -> None:
            if self._get(name) is not None:  # else an earlier try was heard, and only its answer was lost
                self._objects.delete_namespaced_custom_object(
                    **self._where, name=name, propagation_policy="Foreground", _request_timeout=ANSWER_S
                )

        self.ask(act)

    def _get(self, name: str) -> dict[str, Any] | None:
        from kubernetes.client.exceptions import ApiException

        try:
            found: dict[str, Any] = self._objects.get_namespaced_custom_object(
                **self._where, name=name, _request_timeout=ANSWER_S
            )
            return found
        except ApiException as error:
            if error.status == 404 and "could not find the requested resource" not in str(error.body):
                return None
            raise

    def job_logs(self, status: Mapping[str, Any]) -> str:
        """All that the command has printed, asked of the head's dashboard through Kubernetes.

        Args:
            status: of a RayJob whose cluster is there.
        """
        service = str(status["dashboardURL"]).partition(".")[0]
        secret = self._core.read_namespaced_secret(status["rayClusterName"], self.namespace, _request_timeout=ANSWER_S)
        token = base64.b64decode(secret.data["auth_token"]).decode()
        path = f"/api/v1/namespaces/{self.namespace}/services/http:{service}:{DASHBOARD_PORT}/proxy/api/jobs/{status['jobId']}/logs"
        answer = self._core.api_client.call_api(
            path,
            "GET",
            header_params={"X-Ray-Authorization": f"Bearer {token}"},  # the other header is Kubernetes' own
            auth_settings=["BearerToken"],
            response_types_map={200: "object"},
            _return_http_data_only=True,
            _request_timeout=ANSWER_S,
        )
        return str(answer["logs"])

    def ask(self, call: Callable[[], _T]) -> _T:
        """A request that may be made twice, again and again while Kubernetes is away or busy.

        Raises:
            InputError: it does not take what it was given.
            ClusterError: it does not answer, or refuses.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except ImamlError:
                raise
            except Exception as error:  # the client raises whatever its parts raise
                pause = _pause(error)
                if pause is None or time.monotonic() + pause > deadline:
                    raise self._explained(error) from error
            time.sleep(pause)

    def _explained(self, error: Exception) -> ImamlError:
        status, said = getattr(error, "status", None), _message(error)
        at = f"Kubernetes at {self.address}"
        if status in (401, 403):
            return ClusterError(
                f"{at} refuses ({said}); log in again, or ask for the rights on rayjobs in {self.namespace}"
            )
        if status == 404:
            return ClusterError(f"{at} knows no RayJobs ({said}); install KubeRay's operator 1.7, see k8s/README.md")
        if status in (400, 422):
            return InputError(f"{at} does not take the RayJob ({said}); mend what it names")
        return ClusterError(
            f"{at} does not answer as it should ({said}); check it with kubectl get rayjobs -n {self.namespace}"
        )


class KubeJob(JobHandle):
    """One RayJob; see `JobHandle`."""

    def __init__(self, jobs: KubeJobs, id: str) -> None:
        super().__init__(id)
        self._jobs, self._cancelled = jobs, False

    def state(self) -> JobState:
        """See `JobHandle`."""
        return _state(self._found())

    def logs(self, follow: bool = False) -> Iterator[str]:
        """See `JobHandle`. A retry is a new cluster with new output."""
        job, seen, complaint = "", 0, ""
        while True:
            found = self._found()
            status, over = found.get("status", {}), _state(found).status.is_over
            if status.get("jobId") and status.get("dashboardURL"):
                if status["jobId"] != job:
                    job, seen = status["jobId"], 0
                try:
                    text = self._jobs.job_logs(status)
                    complaint = ""
                except Exception as error:  # output is not the job: it goes on, and may be read later
                    text = ""
                    if complaint != (complaint := f"[output cannot be read now: {_message(error)}]\n"):
                        yield complaint
                if new := text[seen:]:
                    seen += len(new)
                    yield new
            if over or not follow:
                return
            time.sleep(POLL_S)

    def cancel(self) -> bool:
        """See `JobHandle`. The RayJob is deleted, and its pods end as Kubernetes ends pods."""
        if self.done():
            return False
        self._cancelled = True
        self._jobs.delete(self.id)
        return True

    def _found(self) -> dict[str, Any]:
        found = self._jobs.find(self.id)
        if found is None and self._cancelled:
            return {"metadata": {}, "status": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}}
        if found is None:
            raise InputError(
                f"there is no RayJob {self.id} in namespace {self._jobs.namespace}; imaml jobs list {self._jobs.options} names all"
            )
        return found


def _state(found: Mapping[str, Any]) -> JobState:
    metadata, status = found.get("metadata", {}), found.get("status", {})
    deployment, job, message = (status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "message"))
    if metadata.get("deletionTimestamp"):
        where = JobStatus.STOPPED
    elif deployment == "Complete":
        where = JobStatus(job) if job in ("SUCCEEDED", "STOPPED") else JobStatus.FAILED
    elif deployment in ("Failed", "ValidationFailed"):
        where = JobStatus.FAILED
    else:
        where = JobStatus.RUNNING if deployment == "Running" and job == "RUNNING" else JobStatus.PENDING
    said = re.search(r"failed with exit code (\d+)", message)  # Ray's words: KubeRay keeps no number
    code = 0 if where is JobStatus.SUCCEEDED else int(said[1]) if said and where is JobStatus.FAILED else None
    entrypoint = re.search(r"--run-dir (\S+)", found.get("spec", {}).get("entrypoint", ""))
    started = metadata.get("creationTimestamp")
    return JobState(
        where,
        code,
        message or status.get("reason", ""),
        entrypoint[1] if entrypoint else "",
        datetime.fromisoformat(started).timestamp() if started else None,
    )


def _pause(error: Exception) -> float | None:
    """Seconds until the same request may succeed; None if it cannot."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        if error.status not in PASSING:
            return None
        asked = (error.headers or {}).get("Retry-After", "")
        return min(float(asked), LONGEST_PAUSE_S) if str(asked).isdigit() else POLL_S
    return POLL_S if isinstance(error, (HTTPError, OSError)) else None


def _message(error: Exception) -> str:
    """What Kubernetes said, in one line."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())[:300]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, KeyError):
        return brief(error)
