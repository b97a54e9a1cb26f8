"""The `imaml` command: arguments in, exit codes out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from imaml_dist import __version__
from imaml_dist.errors import InputError, OutsideError
from imaml_dist.storage.local import local_path
from pipelines import console
from pipelines.cli_jobs import jobs_app
from pipelines.cli_prepare import Anonymous, Endpoint, RetrySeconds, prepare_app, storage_of
from pipelines.exit_codes import INTERRUPTED, exit_codes, state

app = typer.Typer(
    name="imaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Meta-train models with implicit gradients (iMAML), on a laptop or a Ray cluster.",
)
app.add_typer(prepare_app, name="prepare")
app.add_typer(jobs_app, name="jobs")

PAGE = "comparison.html"

Run = Annotated[str, typer.Argument(help="Run directory: a path, file:// or s3:// URL.", show_default=False)]
Json = Annotated[str | None, typer.Option("--json", help="Also write the result to this file.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"imaml {__version__}")
        raise typer.Exit


def _file_to_write(option: str, given: str) -> Path:
    """The path behind a path or `file://` URL, looked at before anything is computed for it.

    Raises:
        InputError: another scheme, a folder, or a file in a folder that does not exist.
    """
    path = local_path(given)
    if path.is_dir():
        raise InputError(f"{option} {given}: is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {given}: there is no folder {path.parent}; make it, or give another path")
    return path


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command."""
    state.debug = debug


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Configuration file.", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.field=value.")] = None,
    backend: Annotated[str | None, typer.Option(help="ray or local; overrides run.backend.")] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Where the run is kept: a path, file:// or s3:// URL; runs/<name> if not given.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier run in the same directory and start over.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time 10 meta-steps phase by phase and trace one: RUN/profile.")
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train under so many seeds, from run.seed on, each in RUN/seed-<seed>.")
    ] = 1,
    mlflow_parent: Annotated[
        str | None, typer.Option(hidden=True, help="MLflow run above this one, a sweep's.")
    ] = None,
) -> None:
    """Meta-train, meta-test and report. The same command again resumes."""
    with exit_codes(orderly=True):
        from pipelines.repeats import train_seeds
        from pipelines.train import train as run_training

        overrides = [*(set_ or []), *([f"run.backend={backend}"] if backend else [])]
        overrides += ["run.profile=10"] if profile else []
        arguments = (config, overrides, run_dir, fresh)
        if not (run_training(*arguments, mlflow_parent) if seeds == 1 else train_seeds(*arguments, seeds)):
            raise typer.Exit(INTERRUPTED)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override a field of the sweep: budget.trials=8, or of its base: base.section.field=value."
        ),
    ] = None,
    sweep_dir: Annotated[str | None, typer.Option(help="Where the sweep is kept; runs/<name> if not given.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier sweep in the same directory and start over.")
    ] = False,
) -> None:
    """Search hyperparameters with Ray Tune; every trial is a run of its own. The same command again resumes."""
    with exit_codes(orderly=True):
        from pipelines.sweep import sweep as run_sweep

        if not run_sweep(file, set_ or [], sweep_dir, fresh):
            raise typer.Exit(INTERRUPTED)


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str | None, typer.Option(help="train, val or test; test if not given.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Number of tasks; 600 if not given.")] = None,
    manifest: Annotated[str | None, typer.Option(help="Frozen tasks to evaluate on, in place of these two.")] = None,
    json_file: Json = None,
) -> None:
    """Meta-test the best checkpoint of a run: mean and 95% interval."""
    with exit_codes():
        from imaml_dist.tracking.metrics_file import finite
        from pipelines.evaluate import evaluate_run

        target = None if json_file is None else _file_to_write("--json", json_file)
        result = evaluate_run(run, split, tasks, manifest)
        if target is not None:
            target.write_text(json.dumps(finite(result), indent=1) + "\n", encoding="utf-8")


@app.command()
def diagnose(
    run: Run,
    tasks: Annotated[int, typer.Option(help="Number of tasks; each takes seconds to minutes.")] = 50,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    json_file: Json = None,
) -> None:
    """Say whether the implicit gradient of a run is one: the inner solve, the system, and the error of the meta-gradient."""
    with exit_codes():
        from imaml_dist.tracking.metrics_file import finite
        from pipelines.diagnose import diagnose_run

        target = None if json_file is None else _file_to_write("--json", json_file)
        result = diagnose_run(run, split, tasks)
        if target is not None:
            target.write_text(json.dumps(finite(result), indent=1) + "\n", encoding="utf-8")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="Configuration file.", show_default=False)],
    run_dir: Annotated[
        str, typer.Option(help="Where the run is kept, and resumed from: s3:// URL, or a folder that all nodes share.")
    ],
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of a Ray cluster's dashboard: http://head:8265."),
    ] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Of the job; made of configuration and run directory.")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Goes with the job, but for what is hidden or ignored; the current one if not given."),
    ] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for its end.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="As a RayJob of KubeRay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the manifest and submit nothing.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.field=value.")] = None,
    image: Annotated[str | None, typer.Option(help="Of all pods, with a tag that stays or a digest.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Of Kubernetes.")] = None,
    options_file: Annotated[
        Path | None, typer.Option("--options", help="File of options of Kubernetes; see docs/kubernetes.md.")
    ] = None,
) -> None:
    """Train as a job of a Ray cluster, or as a RayJob on Kubernetes. The same again follows or resumes."""
    with exit_codes():
        from pipelines.jobs import check_cluster

        of_ray = {"--id": id_, "--working-dir": working_dir}
        of_k8s = {"--image": image, "--namespace": namespace, "--options": options_file, "--dry-run": dry_run or None}
        check_cluster(address, k8s, of_ray, of_k8s)
        given = {name: value for name, value in (("image", image), ("namespace", namespace)) if value is not None}
        kube = (config, set_ or [], run_dir, options_file, given)
        if dry_run:
            from cluster.kuberay import to_yaml
            from pipelines.submit import rayjob

            typer.echo(to_yaml(rayjob(*kube)), nl=False)
            return
        from pipelines.jobs import submit_to_kubernetes, submit_to_ray

        if k8s:
            raise typer.Exit(submit_to_kubernetes(*kube, not no_follow))
        assert address is not None
        raise typer.Exit(submit_to_ray(config, set_ or [], run_dir, address, id_, working_dir or Path(), not no_follow))


@app.command("freeze-tasks")
def freeze_tasks(
    config: Annotated[Path, typer.Argument(help="Configuration file.", show_default=False)],
    out: Annotated[str, typer.Option("--out", help="Manifest to write: a path, file:// or s3:// URL.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 600,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.field=value.")] = None,
) -> None:
    """Write the tasks of an evaluation down, so that others can evaluate on exactly these."""
    with exit_codes():
        from pipelines.freeze_tasks import freeze_tasks as freeze

        freeze(config, set_ or [], out, split, tasks)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run directory, or several to compare.", show_default=False)],
    out: Annotated[
        str | None, typer.Option("--out", help="Page that compares several; comparison.html if not given.")
    ] = None,
) -> None:
    """Write RUN/report.html, one file with everything worth looking at; of several runs, one page that compares them."""
    with exit_codes():
        from pipelines.report import compare_runs, report_run

        if len(runs) == 1 and out is not None:
            raise InputError(
                f"--out {out}: a single run's report is RUN/report.html; leave --out away, or give more runs"
            )
        several = len(runs) > 1
        page = compare_runs(runs, _file_to_write("--out", out or PAGE)) if several else report_run(runs[0])
        console.out.print(page, soft_wrap=True)


@app.command()
def verify(
    url: Annotated[
        str, typer.Argument(help="Of a prepared data set: a path, file:// or s3:// URL.", show_default=False)
    ],
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
) -> None:
    """Check every byte of a data set against its index, and name what does not match."""
    with exit_codes():
        from pipelines.verify import verify as run_verification

        run_verification(storage_of(url, endpoint, anonymous, retry_seconds))


@app.command("mlflow-sync")
def mlflow_sync(run: Run) -> None:
    """Send to MLflow what a run could not send while the server was away."""
    with exit_codes():
        from pipelines.mlflow_sync import sync_patiently

        sync_patiently(run)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file, whose needs are looked at, too.", show_default=False)
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.field=value.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Where a run is to be kept; is written to, once.")] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of a Ray cluster's dashboard: http://head:8265."),
    ] = None,
) -> None:
    """Check Python, devices, Ray, storage, MLflow and Kubernetes, and say how to mend what is wrong."""
    with exit_codes():
        from pipelines.doctor import doctor as examine

        if not examine(config, set_ or [], run_dir, address):
            raise typer.Exit(OutsideError.exit_code)


def main() -> None:
    """Entry point of the `imaml` console script."""
    try:
        app()
    finally:
        if state.leave_at_once:  # Python would wait for threads that still fetch, for as long as storage has patience
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
