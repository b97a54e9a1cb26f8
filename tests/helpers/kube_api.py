"""A stand-in of Kubernetes' API with RayJobs: it records every request, and answers as badly as it is told.

No operator is behind it: a test says what becomes of a job (`become`, `output`).
"""

import base64
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "CANARY-of-the-cluster"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1"


class KubeApi(ThreadingHTTPServer):
    """As long as the context lasts.

    Attributes:
        jobs: the RayJobs, by name.
        definitions: custom resource definitions, by name.
        output: of jobs, by Ray's id of them.
        requests: method and path of each.
        faults: what happens to the next requests of a method and a part of a path: a status, `lose` (carried out, and no answer) or
            `drop` (not carried out, and no answer).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.jobs: dict[str, dict[str, Any]] = {}
        self.definitions: dict[str, dict[str, Any]] = {}
        self.output: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, int | str]] = []
        self.made = 0
        """RayJobs that were created, not changed."""
        self.lock = threading.RLock()

    def __enter__(self) -> "KubeApi":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up."""

    def kubeconfig(self, folder: Path) -> Path:
        """A file that leads here."""
        named = {
            "clusters": [{"name": "stand-in", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": "CANARY-of-the-user"}}],
            "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "me"}}],
        }
        path = folder / "kubeconfig.yaml"
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "stand-in", **named}))
        path.chmod(0o600)
        return path

    def become(self, name: str, deployment: str, job: str = "", message: str = "", attempt: int = 1) -> None:
        """What the operator would write into a job."""
        with self.lock:
            self.jobs[name]["status"] = {
                "jobDeploymentStatus": deployment,
                "jobStatus": job,
                "message": message,
                "jobId": f"{name}-ray-{attempt}",
                "rayClusterName": f"{name}-x{attempt}",
                "dashboardURL": f"{name}-x{attempt}-head-svc.imaml.svc.cluster.local:8265",
            }

    def fault(self, method: str, path: str) -> int | str | None:
        """What is to go wrong with a request, once."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault[0] == method and fault[1] in path:
                    self.faults.remove(fault)
                    return fault[2]
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: KubeApi

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._answer(fault, {"kind": "Status", "code": fault, "message": f"as told: {fault}"})
            return
        with self.server.lock:
            status, answer = self._carry_out(urlsplit(self.path), body)
        if fault == "lose":
            self.close_connection = True
            return
        self._answer(status, answer)

    do_PATCH = do_DELETE = do_GET

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _carry_out(self, parts: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        path, server = parts.path, self.server
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            version = {"groupVersion": "apiextensions.k8s.io/v1", "version": "v1"}
            group = {"name": "apiextensions.k8s.io", "versions": [version], "preferredVersion": version}
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
        if path == DEFINITIONS:
            kind = {"name": "customresourcedefinitions", "singularName": "customresourcedefinition", "namespaced": False,
                    "kind": "CustomResourceDefinition", "verbs": ["get"], "shortNames": ["crd"]}  # fmt: skip
            return 200, {"kind": "APIResourceList", "groupVersion": "apiextensions.k8s.io/v1", "resources": [kind]}
        if path == "/api/v1":
            return 200, {"kind": "APIResourceList", "groupVersion": "v1", "resources": []}
        name = path.rpartition("/")[2]
        if path.startswith(f"{DEFINITIONS}/"):
            return self._found(server.definitions.get(name), "customresourcedefinitions.apiextensions.k8s.io", name)
        if path == "/apis/ray.io/v1/namespaces/imaml/rayjobs":
            return 200, {"kind": "RayJobList", "items": list(server.jobs.values())}
        if path.startswith("/apis/ray.io/v1/namespaces/imaml/rayjobs/"):
            return self._job(name, parse_qs(parts.query), body)
        if path.startswith("/api/v1/namespaces/imaml/secrets/"):
            return 200, {"kind": "Secret", "data": {"auth_token": base64.b64encode(TOKEN.encode()).decode()}}
        if "/proxy/api/jobs/" in path:
            if self.headers["X-Ray-Authorization"] != f"Bearer {TOKEN}" or not path.endswith("/logs"):
                return 403, {"message": "Forbidden: Invalid authentication token"}
            return 200, {"logs": server.output.get(path.split("/")[-2], "")}
        return 404, {"kind": "Status", "code": 404, "message": "the server could not find the requested resource"}

    def _found(self, found: dict[str, Any] | None, kind: str, name: str) -> tuple[int, dict[str, Any]]:
        if found is not None:
            return 200, found
        message = f'{kind} "{name}" not found'
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        return 404, {**status, "message": message}

    def _job(self, name: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, Any]]:
        jobs = self.server.jobs
        if self.command == "PATCH":
            if self.headers["Content-Type"] != "application/apply-patch+yaml" or query["fieldManager"] != ["imaml"]:
                return 415, {"message": "only server-side apply"}
            applied = yaml.safe_load(body)
            self.server.made += name not in jobs
            before = jobs.get(name, {"status": {}, "metadata": {"creationTimestamp": "2026-11-29T05:00:00Z"}})
            jobs[name] = copy.deepcopy(applied) | {"status": before["status"]}
            jobs[name]["metadata"]["creationTimestamp"] = before["metadata"]["creationTimestamp"]
            return 200, jobs[name]
        if self.command == "DELETE" and name in jobs:
            return 200, jobs.pop(name)
        return self._found(jobs.get(name), "rayjobs.ray.io", name)
