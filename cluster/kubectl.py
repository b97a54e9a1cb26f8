"""What kubectl knows: which cluster it would talk to, and whether KubeRay is installed there."""

from __future__ import annotations

import json
import shutil
import subprocess

from imaml_dist.errors import ClusterError

ANSWER_S = 10
CRDS = ("rayclusters.ray.io", "rayjobs.ray.io")
API = "v1"
"""Of KubeRay's resources, as our manifests name it."""

NEWEST_FIELD = "preRunningDeadlineSeconds"
"""Of a RayJob's spec, that our manifests have: KubeRay 1.7 brought it."""


def is_installed() -> bool:
    """Whether there is a kubectl."""
    return shutil.which("kubectl") is not None


def context() -> str | None:
    """The cluster that it would talk to; None if none is chosen."""
    done = _kubectl("config", "current-context")
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def kuberay() -> str:
    """What of KubeRay is installed, in words.

    Raises:
        ClusterError: the cluster does not answer, refuses, or has not what our manifests need.
    """
    done = _kubectl("get", "crd", *CRDS, "-o", "json", f"--request-timeout={ANSWER_S}s")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1][:200]
        if "NotFound" in said:
            raise ClusterError(f"KubeRay is not installed ({said}); install its operator 1.7, see k8s/README.md")
        raise ClusterError(f"the cluster does not tell ({said}); check the context and your rights: kubectl get crd")
    served = {}
    for crd in json.loads(done.stdout)["items"]:
        schemas = {v["name"]: v.get("schema", {}) for v in crd["spec"]["versions"] if v.get("served")}
        served[crd["metadata"]["name"]] = schemas
    for name in CRDS:
        if API not in served.get(name, {}):
            raise ClusterError(f"{name} is not served as {API}; install KubeRay's operator 1.7, see k8s/README.md")
    job = served["rayjobs.ray.io"][API].get("openAPIV3Schema", {}).get("properties", {}).get("spec", {})
    if NEWEST_FIELD not in job.get("properties", {}):
        raise ClusterError(
            f"KubeRay is older than 1.7: a RayJob has no {NEWEST_FIELD}; upgrade the operator with its resource definitions"
        )
    return ", ".join(f"{name} {'/'.join(sorted(versions))}" for name, versions in sorted(served.items()))


def _kubectl(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - constants
            ["kubectl", *words],  # noqa: S607 - the user's own
            capture_output=True,
            text=True,
            timeout=3 * ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"kubectl does not work ({error}); mend it, or take it off the PATH") from error
