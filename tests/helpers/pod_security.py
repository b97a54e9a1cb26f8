"""What Kubernetes' pod-security level `restricted` refuses in a manifest's pods."""

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def refused(document: Any, path: str = "") -> list[str]:
    """Every reason, with its path. A pod is whatever holds a list of containers with images."""
    found: list[str] = []
    if isinstance(document, dict):
        containers = document.get("containers")
        if isinstance(containers, list) and containers and isinstance(containers[0], dict) and "name" in containers[0]:
            found += _of_pod(document, path)
        if "autoscalerOptions" in document or document.get("enableInTreeAutoscaling") is True:
            # KubeRay puts a container of its own beside the head's.
            options = document.get("autoscalerOptions", {}).get("securityContext", {})
            pod = document.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("securityContext", {})
            found += _of_container({"securityContext": options}, pod, f"{path}.autoscalerOptions")
        for key, below in document.items():
            found += refused(below, f"{path}.{key}")
    elif isinstance(document, list):
        for index, below in enumerate(document):
            found += refused(below, f"{path}[{index}]")
    return found


def _of_pod(pod: dict[str, Any], path: str) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{path}.{field}"
    for volume in pod.get("volumes", []):
        if not (set(volume) - {"name"}) <= VOLUMES:
            yield f"{path}: volume {volume}"
    context = pod.get("securityContext", {})
    if context.get("sysctls"):
        yield f"{path}: sysctls"
    if context.get("runAsUser") == 0:
        yield f"{path}: runs as root"
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            yield from _of_container(container, context, f"{path}.{container['name']}")
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{path}.{container['name']}: hostPort"


def _of_container(container: dict[str, Any], pod: dict[str, Any], path: str) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield f"{path}: may gain privileges"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{path}: keeps capabilities"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True or own.get("runAsUser", 1) == 0:
        yield f"{path}: may run as root"
    if own.get("procMount", "Default") != "Default":
        yield f"{path}: procMount"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{path}: no seccomp profile"
