"""`imaml jobs ...`: the arguments of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.exit_codes import exit_codes

jobs_app = typer.Typer(no_args_is_help=True, help="Jobs of a Ray cluster or of Kubernetes.")

Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of a Ray cluster's dashboard: http://head:8265."),
]
K8s = Annotated[bool, typer.Option("--k8s", help="RayJobs of KubeRay.")]
Namespace = Annotated[str, typer.Option(help="Of Kubernetes.")]
Id = Annotated[str, typer.Argument(help="Of the job, as imaml submit and imaml jobs list name it.", show_default=False)]


@jobs_app.command("list")
def list_jobs(address: Address = None, k8s: K8s = False, namespace: Namespace = "imaml") -> None:
    """All jobs that were submitted to a cluster, the oldest first."""
    with exit_codes():
        from pipelines.jobs import jobs_of, show_jobs

        show_jobs(jobs_of(address, k8s, namespace))


@jobs_app.command()
def status(id: Id, address: Address = None, k8s: K8s = False, namespace: Namespace = "imaml") -> None:
    """Where a job is, and its exit code."""
    with exit_codes():
        from pipelines.jobs import jobs_of, show_status

        show_status(id, jobs_of(address, k8s, namespace))


@jobs_app.command()
def logs(
    id: Id,
    address: Address = None,
    k8s: K8s = False,
    namespace: Namespace = "imaml",
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job is over; its exit code is then this command's.")
    ] = False,
) -> None:
    """What a job has printed."""
    with exit_codes():
        from pipelines.jobs import jobs_of, show_logs

        raise typer.Exit(show_logs(id, jobs_of(address, k8s, namespace), follow))


@jobs_app.command()
def cancel(id: Id, address: Address = None, k8s: K8s = False, namespace: Namespace = "imaml") -> None:
    """Stop a job: on a Ray cluster it writes a checkpoint first, on Kubernetes it is deleted."""
    with exit_codes():
        from pipelines.jobs import cancel as run_cancel
        from pipelines.jobs import jobs_of

        run_cancel(id, jobs_of(address, k8s, namespace))
