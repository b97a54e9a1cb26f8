"""`imaml doctor`: whether everything is there that a run needs, and how to mend what is not."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table

from cluster import kubectl
from imaml_dist.config.load import load_config
from imaml_dist.config.model import MLPConfig
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import open_dataset, storage_options
from imaml_dist.errors import ClusterError, ImamlError, StorageError
from imaml_dist.kernels import native
from imaml_dist.storage.lease import Lease
from imaml_dist.storage.local import without_secrets
from imaml_dist.storage.opening import S3, open_storage
from imaml_dist.storage.options import StorageOptions
from pipelines import console
from pipelines.submit import needs

PYTHONS = ((3, 11), (3, 14))
"""From the first to before the second."""

PROBE = ".imaml-doctor"
"""Object that is written where a run is to be kept, and removed."""


@dataclass(frozen=True)
class Finding:
    """What was looked at.

    Args:
        what: it is.
        found: there.
        mend: what to do about it; empty if all is well.
        needed: whether a run cannot do without it.
    """

    what: str
    found: str
    mend: str = ""
    needed: bool = True


def doctor(config_path: Path | None, overrides: Sequence[str], run_dir: str | None, address: str | None) -> bool:
    """Look at everything, and print a table of it.

    Args:
        config_path: a configuration, whose needs are then looked at, too.
        overrides: `section.field=value`.
        run_dir: where a run is to be kept.
        address: of the dashboard of the Ray cluster to submit to.

    Returns:
        Whether all is well that is needed.

    Raises:
        InputError: the configuration cannot be used.
    """
    config = None if config_path is None else load_config(config_path, overrides)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "what", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    well = True
    for finding in _findings(config, run_dir, address):
        mark = "ok" if not finding.mend else "wrong" if finding.needed else "-"
        table.add_row(mark, finding.what, finding.found, finding.mend)
        well = well and not (finding.mend and finding.needed)
    console.whole_lines().print(table)
    return well


def _findings(config: ExperimentConfig | None, run_dir: str | None, address: str | None) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield _devices(config)
    yield _kernels(config)
    yield from _ray(config, address)
    if config is not None:
        yield _tried("data", lambda: _data(config))
    if run_dir is not None:
        options = StorageOptions() if config is None else storage_options(config)
        yield _tried("run directory", lambda: _writable(run_dir, options))
    yield _mlflow(config)
    yield from _kubernetes()


def _tried(what: str, look: Callable[[], str], needed: bool = True) -> Finding:
    """The finding of something that raises errors of ours, whose sentences say what to do."""
    try:
        return Finding(what, look())
    except ImamlError as error:
        found, _, mend = str(error).rpartition("; ")
        return Finding(what, found or "-", mend, needed)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    least, below = (".".join(map(str, v)) for v in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]
    return Finding("Python", found, "" if fits else f"install Python {least} or newer, below {below}")


def _packages() -> Iterator[Finding]:
    """Those that our own package requires."""
    try:
        needed = [Requirement(text) for text in requires("imaml_dist") or []]
    except PackageNotFoundError:
        yield Finding("imaml_dist", "not installed", "pip install imaml_dist")
        return
    found, missing = [], []
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(one.name)
        except PackageNotFoundError:
            missing.append(Finding(one.name, "not installed", f"pip install '{one}'"))
            continue
        if there not in one.specifier:
            missing.append(Finding(one.name, there, f"pip install '{one}'"))
        elif one.name in ("torch", "ray", "mlflow", "webdataset", "boto3"):
            found.append(f"{one.name} {there}")
    yield Finding("packages", ", ".join(found))
    yield from missing


def _devices(config: ExperimentConfig | None) -> Finding:
    wanted = config is not None and config.run.device == "cuda" and config.run.backend == "local"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("devices", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    found = f"{os.cpu_count()} CPUs, no GPU"
    if torch.version.cuda is None:
        mend = "install torch's build for CUDA, or use --set run.device=cpu"
    else:
        mend = "check the driver with nvidia-smi, or use --set run.device=cpu"
    return Finding("devices", found, mend if wanted else "")


def _kernels(config: ExperimentConfig | None) -> Finding:
    if config is not None and (isinstance(config.model, MLPConfig) or config.run.device == "cuda"):
        return Finding("CPU kernels", "not used by this run")
    required = config is not None and config.run.execution == "native"
    return _tried("CPU kernels", _compiled, required)


def _compiled() -> str:
    return "compiled" if native.is_compiled() else "compiled by the first run that needs them"


def _ray(config: ExperimentConfig | None, address: str | None) -> Iterator[Finding]:
    if address is not None:
        yield _tried("Ray dashboard", lambda: _dashboard(address))
    if config is not None and config.run.backend == "local":
        yield Finding("Ray", "not used by this run")
    elif "RAY_ADDRESS" in os.environ:
        yield _tried("Ray", lambda: _cluster(config))
    elif address is None:
        yield Finding("Ray", "no RAY_ADDRESS: a private cluster is started for each run")


def _dashboard(address: str) -> str:
    from cluster.ray_jobs import RayJobs

    there, here = RayJobs(address).ray_version, version("ray")
    if there != here:
        raise ClusterError(f"Ray {there} at {address}, {here} here; install ray=={there} here, or {here} there")
    return f"Ray {there} at {address}, as here; the token is taken"


def _cluster(config: ExperimentConfig | None) -> str:
    from cluster.resources import Needs, misfit, nodes
    from cluster.session import ray_session

    with ray_session(0):
        offered = nodes()
    wanted = Needs(1, 1, 1.0) if config is None else needs(config)
    if why := misfit(wanted, offered):
        raise ClusterError(why)
    return f"{len(offered)} nodes at {os.environ['RAY_ADDRESS']} with room for the run"


def _data(config: ExperimentConfig) -> str:
    with tempfile.TemporaryDirectory() as cache:
        private = config.storage.model_copy(update={"cache": cache})  # nothing that was read before must answer
        dataset = open_dataset(config.model_copy(update={"storage": private}))
        index = dataset.index
        dataset.close()
        first = index.shards[0]
        open_storage(config.data.url, storage_options(config)).read(first.name, 0, 1)
    return f"{index.name}, {len(index.shards)} shards, at {dataset.url}"


def _writable(run_dir: str, options: StorageOptions) -> str:
    storage = open_storage(run_dir, options)
    if storage.url.startswith(S3):
        lease = Lease(storage, PROBE)
        lease.acquire(patience=options.retry_seconds)
        lease.release()
        storage.remove(PROBE)
        return f"{storage.url} can be written, and keeps two writers apart"
    folder = Path(storage.url).absolute()
    there = next(above for above in (folder, *folder.parents) if above.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise StorageError(f"{there}: {error.strerror}; choose another --run-dir, or make it writable") from error
    return f"{there} can be written"


def _mlflow(config: ExperimentConfig | None) -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if config is not None and not config.tracking.mlflow:
        return Finding("MLflow", "not used by this run")
    if not uri:
        return Finding("MLflow", "no MLFLOW_TRACKING_URI: runs/mlflow.db")
    from imaml_dist.tracking.mlflow_link import MlflowLink

    with tempfile.TemporaryDirectory() as folder:
        link = MlflowLink(Path(folder))
        try:
            link.knock()
        except Exception as error:  # MLflow raises whatever its parts raise
            found = f"{without_secrets(uri)} does not answer ({link.explained(error).splitlines()[0][:160]})"
            return Finding(
                "MLflow",
                found,
                "check MLFLOW_TRACKING_URI, user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD); runs go on, "
                "and imaml mlflow-sync sends what is left",
                config is not None,
            )
    return Finding("MLflow", f"{without_secrets(uri)} answers")


def _kubernetes() -> Iterator[Finding]:
    """Nothing that a configuration needs; for `imaml submit --k8s`."""
    if not kubectl.is_installed():
        yield Finding("Kubernetes", "no kubectl", "install kubectl, if you submit to Kubernetes", needed=False)
        return
    context = kubectl.context()
    if context is None:
        mend = "kubectl config use-context NAME, if you submit to Kubernetes"
        yield Finding("Kubernetes", "no context is chosen", mend, needed=False)
        return
    yield Finding("Kubernetes", f"context {context}")
    yield _tried("KubeRay", kubectl.kuberay, needed=False)
