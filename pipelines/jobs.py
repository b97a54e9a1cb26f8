"""`imaml submit` and `imaml jobs`: training as a job of a Ray cluster or of Kubernetes, and what becomes of it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.jobs import STOP_S, JobHandle, Jobs, JobState, JobStatus
from cluster.kube_jobs import KubeJobs
from cluster.kuberay import job_name
from cluster.ray_jobs import RayJobs, Submission
from imaml_dist.config.load import load_config, to_yaml
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ClusterError, ConfigError, InputError
from imaml_dist.storage.opening import S3
from pipelines import console
from pipelines.exit_codes import INTERRUPTED
from pipelines.submit import rayjob

CONFIG_FILE = "imaml-config"
"""In the job's folder; without an ending, for a .gitignore may keep all files of one at home."""

CANCEL_S = STOP_S + 30.0
"""How long a job that is asked to end may take."""

NOT_FOUND = 127
"""Exit code of a shell that finds no such command."""


def jobs_of(address: str | None, k8s: bool, namespace: str) -> Jobs:
    """Those of the cluster that options of a command name.

    Raises:
        InputError: they name none, or two.
        ClusterError: it cannot be reached, or refuses.
    """
    check_cluster(address, k8s)
    if k8s:
        return KubeJobs(namespace)
    assert address is not None
    return RayJobs(address)


def check_cluster(
    address: str | None, k8s: bool, of_ray: Mapping[str, Any] | None = None, of_k8s: Mapping[str, Any] | None = None
) -> None:
    """Options of a command must name one cluster, and be about its kind.

    Args:
        address: of a Ray cluster's dashboard; that of the environment gives way to `k8s`.
        k8s: whether Kubernetes is meant.
        of_ray: option -> value, None if not given: those that a Ray cluster's jobs have.
        of_k8s: the same, those that RayJobs have.

    Raises:
        InputError: they do not.
    """
    if not k8s and address is None:
        raise InputError("which cluster is not said; give --address http://head:8265 of a Ray dashboard, or --k8s")
    if k8s and address not in (None, os.environ.get("RAY_API_SERVER_ADDRESS")):
        raise InputError(f"--address {address} and --k8s given, which are two clusters; leave one away")
    of_other, which = (of_ray, "with") if k8s else (of_k8s, "without")
    if odd := [option for option, value in (of_other or {}).items() if value is not None]:
        raise InputError(f"{', '.join(odd)} given {which} --k8s, where it means nothing; leave it away")


def submit_to_ray(
    config_path: Path,
    overrides: Sequence[str],
    run_dir: str,
    address: str,
    id: str | None,
    working_dir: Path,
    follow: bool,
) -> int:
    """Train on a Ray cluster. The same again follows the job there is, or goes on where one that failed has ended.

    Args:
        config_path: configuration file.
        overrides: `section.field=value`.
        run_dir: where the run is kept, for all nodes alike.
        address: of the cluster's dashboard.
        id: of the job; made of the configuration and the run directory if None.
        working_dir: goes with the job.
        follow: print its output until it is over.

    Returns:
        Exit code of the job; 0 if it is not followed.

    Raises:
        InputError: what cannot work; nothing was sent.
        ClusterError: the cluster cannot be reached, or refuses.
    """
    config = load_config(config_path, overrides)
    _check_reachable(config, run_dir)
    text = to_yaml(config)
    identity = hashlib.sha256(f"{run_dir}\n{text}".encode()).hexdigest()
    id = id or f"{job_name(config.name)}-{identity[:8]}"
    command = ("imaml", "train", CONFIG_FILE, "--run-dir", run_dir)
    wanted = Submission(id, command, identity, run_dir, working_dir, {CONFIG_FILE: text})
    jobs = RayJobs(address)
    return _submitted(jobs, lambda: jobs.submit(wanted), id, follow)


def submit_to_kubernetes(
    config_path: Path,
    overrides: Sequence[str],
    run_dir: str,
    options_path: Path | None,
    given: dict[str, Any],
    follow: bool,
) -> int:
    """Train as a RayJob of KubeRay; else as `submit_to_ray`, with the options of `pipelines.submit.rayjob`."""
    manifest = rayjob(config_path, overrides, run_dir, options_path, given)
    jobs = KubeJobs(manifest["metadata"]["namespace"])
    return _submitted(jobs, lambda: jobs.submit(manifest), manifest["metadata"]["name"], follow)


def _submitted(jobs: Jobs, act: Callable[[], tuple[JobHandle, bool]], id: str, follow: bool) -> int:
    try:
        job, is_new = act()
        state = "submitted" if is_new else f"there already ({job.status()})"
    except KeyboardInterrupt:
        console.err.print(f"interrupted; if job {id} was submitted it goes on: {_ways(id, jobs)}", soft_wrap=True)
        return INTERRUPTED
    console.out.print(f"job {job.id}: {state}", soft_wrap=True)
    if not follow:
        console.out.print(_ways(job.id, jobs), soft_wrap=True)
        return 0
    return follow_to_end(job, jobs)


def follow_to_end(job: JobHandle, jobs: Jobs) -> int:
    """Print a job's output as it comes, and how it ended; Ctrl-C lets go of it.

    Returns:
        Exit code of the job, or 130 if it was stopped or this is interrupted.

    Raises:
        ClusterError: the cluster cannot be reached any more or has no such job any more, or the command could not be run.
    """
    try:
        for text in job.logs(follow=True):
            sys.stdout.write(text)
            sys.stdout.flush()
        code = job.result()
    except KeyboardInterrupt:
        console.err.print(f"job {job.id} goes on: {_ways(job.id, jobs)}", soft_wrap=True)
        return INTERRUPTED
    except CancelledError as error:
        console.err.print(f"{error}; submitting it again goes on from its last checkpoint", soft_wrap=True)
        return INTERRUPTED
    except InputError as error:  # it was there before
        raise ClusterError(
            f"job {job.id} is no longer there: it was deleted, or its cluster was begun anew; submitting it again goes on from its "
            "last checkpoint"
        ) from error
    if code == NOT_FOUND:
        raise ClusterError(
            f"job {job.id}: the cluster's head finds no imaml; install imaml_dist there, on the PATH that `ray start` is given"
        )
    if code:
        console.err.print(f"job {job.id} failed with exit code {code}", soft_wrap=True)
    return code


def show_jobs(jobs: Jobs) -> None:
    """A table of all jobs of a cluster."""
    table = Table(box=None)
    for column in ("job", "status", "exit code", "since", "run directory"):
        table.add_column(column, overflow="fold")
    for id, state in jobs.all():
        table.add_row(id, *_row(state))
    console.out.print(table)


def show_status(id: str, jobs: Jobs) -> None:
    """Where one job is.

    Raises:
        InputError: there is no such job.
    """
    state = jobs.job(id).state()
    status, code, since, run_dir = _row(state)
    rows = {"status": status, "exit code": code, "since": since, "run directory": run_dir}
    console.table(id, rows, state.message if state.status is JobStatus.FAILED else "")


def show_logs(id: str, jobs: Jobs, follow: bool) -> int:
    """The output of one job so far, or until it is over.

    Returns:
        0, or the exit code of a job that is followed.
    """
    job = jobs.job(id)
    if follow:
        return follow_to_end(job, jobs)
    for text in job.logs():
        sys.stdout.write(text)
    return 0


def cancel(id: str, jobs: Jobs) -> None:
    """Stop one job, and wait until it is.

    Raises:
        InputError: there is no such job.
        ClusterError: it does not end.
    """
    job = jobs.job(id)
    if job.cancel():
        console.out.print(f"job {id} {jobs.cancelling}", soft_wrap=True)
        try:
            job.result(CANCEL_S)
        except CancelledError:
            pass
        except TimeoutError as error:
            raise ClusterError(f"{error} after it was asked to stop; look at the cluster's dashboard") from error
    console.out.print(f"job {id}: {job.status()}", soft_wrap=True)


def _row(state: JobState) -> tuple[str, str, str, str]:
    since = "" if state.started is None else f"{datetime.fromtimestamp(state.started):%Y-%m-%d %H:%M:%S}"
    return str(state.status), "" if state.exit_code is None else str(state.exit_code), since, state.run_dir


def _ways(id: str, jobs: Jobs) -> str:
    return f"imaml jobs logs {id} --follow {jobs.options} follows it, imaml jobs cancel {id} {jobs.options} stops it"


def _check_reachable(config: ExperimentConfig, run_dir: str) -> None:
    """A job's own folder is the head's alone, and goes with the job."""
    warm, frozen = config.warm_start.path, config.validation.manifest
    places = {"--run-dir": run_dir, "data.url": config.data.url, "warm_start.path": warm, "validate.manifest": frozen}
    for what, url in places.items():
        if url is None:
            continue
        if "@" in url:
            raise InputError(
                f"{what}: credentials do not belong in a URL; take them out, and give them to the cluster's nodes"
            )
        if not (url.startswith(S3) or os.path.isabs(url.removeprefix("file://"))):
            raise InputError(
                f"{what}: {url} given, which lies in a folder of this machine; give an s3:// URL, or the absolute path of a folder that "
                "all nodes of the cluster share"
            )
    if config.run.backend != "ray":
        raise ConfigError("run.backend: local given, but a job's workers are found by Ray; use --set run.backend=ray")
    if config.run.device == "auto":
        raise ConfigError(
            "run.device: auto given, but what the cluster has cannot be seen from here; use --set run.device=cpu or cuda"
        )
