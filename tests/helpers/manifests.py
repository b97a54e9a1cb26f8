"""Manifests: rendered from the folders of k8s/, and made of experiments."""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kube_options import KubeOptions
from cluster.kuberay import Run, rayjob
from cluster.resources import Needs

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("dev", "gpu", "kueue")
IMAGE = "registry.example.org/imaml:0.1.0"


@functools.cache
def rendered(overlay: str) -> str:
    """What would be applied; skips the test where kubectl is absent."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, which renders the overlays")
    folder = K8S / "overlays" / overlay
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


@functools.cache
def documents(overlay: str) -> list[dict[str, Any]]:
    """The same, read; not to be changed."""
    return list(yaml.load_all(rendered(overlay), Loader=yaml.CSafeLoader))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    """Documents of an overlay by kind."""
    return [d for d in documents(overlay) if d["kind"] in kinds]


def pods(document: Any) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Every pod of a manifest: (labels, spec)."""
    if isinstance(document, dict):
        spec = document.get("spec", {})
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield document.get("metadata", {}).get("labels", {}), spec
        for below in document.values():
            yield from pods(below)
    elif isinstance(document, list):
        for below in document:
            yield from pods(below)


def every_container(overlay: str) -> Iterator[dict[str, Any]]:
    """Of all pods of an overlay, those that run first included."""
    for document in documents(overlay):
        for _, spec in pods(document):
            yield from (*spec["containers"], *spec.get("initContainers", []))


def of_job(overlay: str, name: str) -> dict[str, Any]:
    """One RayJob of an overlay."""
    (job,) = [d for d in documents(overlay) if d["kind"] == "RayJob" and d["metadata"]["name"] == name]
    return job


def a_rayjob(needs: Needs | None = None, name: str = "tiny", **options: Any) -> dict[str, Any]:
    command = ("imaml", "train", "/etc/imaml/config.yaml", "--run-dir", "s3://b/runs/tiny")
    run = Run(name, command, "name: tiny\n", needs or Needs(2, 2, 1))
    return rayjob(run, KubeOptions.model_validate({"image": IMAGE, **options}))
