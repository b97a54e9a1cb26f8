"""`imaml jobs ...`: the arguments of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.exit_codes import exit_codes

jobs_app = typer.Typer(no_args_is_help=True, help="Jobs of a Ray cluster.")

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard: http://head:8265.", show_default=False
    ),
]
Id = Annotated[str, typer.Argument(help="Of the job, as imaml submit and imaml jobs list name it.", show_default=False)]


@jobs_app.command("list")
def list_jobs(address: Address) -> None:
    """All jobs that were submitted to a cluster, the oldest first."""
    with exit_codes():
        from pipelines.jobs import show_jobs

        show_jobs(address)


@jobs_app.command()
def status(id: Id, address: Address) -> None:
    """Where a job is, and its exit code."""
    with exit_codes():
        from pipelines.jobs import show_status

        show_status(id, address)


@jobs_app.command()
def logs(
    id: Id,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job is over; its exit code is then this command's.")
    ] = False,
) -> None:
    """What a job has printed."""
    with exit_codes():
        from pipelines.jobs import show_logs

        raise typer.Exit(show_logs(id, address, follow))


@jobs_app.command()
def cancel(id: Id, address: Address) -> None:
    """Stop a job; it writes a checkpoint first."""
    with exit_codes():
        from pipelines.jobs import cancel as run_cancel

        run_cancel(id, address)
