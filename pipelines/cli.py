"""The `imaml` command: arguments in, exit codes out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from imaml_dist.errors import ImamlError, InputError, StorageError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import Storage
from pipelines import console

app = typer.Typer(
    name="imaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Meta-train models with implicit gradients (iMAML), on a laptop or a Ray cluster.",
)
prepare_app = typer.Typer(no_args_is_help=True, help="Raw images -> class-record shards.")
app.add_typer(prepare_app, name="prepare")

_debug = False
_leave_at_once = False
"""Ctrl-C was pressed, and nothing is left to be put in order."""

INTERRUPTED = 130

Out = Annotated[str, typer.Option("--out", help="Where to write: a path, file:// or s3:// URL.")]
Endpoint = Annotated[str | None, typer.Option(help="URL of an S3-compatible server; AWS_ENDPOINT_URL_S3 if not given.")]
Size = Annotated[int, typer.Option(help="Pixels of each side, after cutting out the largest centred square.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")]
RetrySeconds = Annotated[float, typer.Option(min=0, help="How long storage may go on failing without progress.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Prepare again what is there already, to mend damage.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Sign no requests, for public buckets.")]
Run = Annotated[str, typer.Argument(help="Run directory: a path, file:// or s3:// URL.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed: {seed} given, seeds are 0 to 2^64 - 1")
    return seed


def _storage(url: str, endpoint: str | None, anonymous: bool, retry_seconds: float) -> Storage:
    return open_storage(url, StorageOptions(endpoint=endpoint, anonymous=anonymous, retry_seconds=retry_seconds))


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options of every command."""
    global _debug
    _debug = debug


@contextmanager
def _exit_codes(*, orderly: bool = False) -> Iterator[None]:
    """Errors made on purpose become one sentence and their exit code; others are bugs and keep their traceback.

    Args:
        orderly: this process has others to end, so even Ctrl-C lets it come to its own end.
    """
    global _leave_at_once
    try:
        yield
    except ImamlError as error:
        if _debug:
            raise
        console.err.print(f"imaml: {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a path that is not what it should be, or a disk that is full or read-only
        if _debug:
            raise
        console.err.print(f"imaml: {error.filename or 'input/output'}: {error.strerror or error}", soft_wrap=True)
        users_own = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        raise typer.Exit(InputError.exit_code if isinstance(error, users_own) else StorageError.exit_code) from None
    except KeyboardInterrupt:
        console.err.print("imaml: interrupted")
        _leave_at_once = not orderly
        raise typer.Exit(INTERRUPTED) from None


@prepare_app.command("glyphs")
def prepare_glyphs(
    out: Out = "data/glyphs",
    seed: Annotated[int, typer.Option(help="Of the rendering.")] = 0,
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
    fresh: Fresh = False,
) -> None:
    """Render the embedded data set: glyphs of the fonts shipped with matplotlib, unseen scripts for testing."""
    with _exit_codes():
        from pipelines import prepare

        prepare.prepare_glyphs(_storage(out, endpoint, anonymous, retry_seconds), _seed(seed), fresh)


@prepare_app.command("omniglot")
def prepare_omniglot(
    out: Out = "data/omniglot",
    source: Annotated[
        str | None,
        typer.Option(
            help="Folder with the official archives or unpacked images, a zip file, or a URL; downloads if not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split into train, val and test.")] = 0,
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
    fresh: Fresh = False,
) -> None:
    """Omniglot: 1,623 characters at 28x28; 1,100 train (with rotations), 100 val, 423 test."""
    with _exit_codes():
        from pipelines import prepare

        prepare.prepare_omniglot(_storage(out, endpoint, anonymous, retry_seconds), source, _seed(seed), fresh)


@prepare_app.command("mini-imagenet")
def prepare_mini_imagenet(
    source: Annotated[
        str,
        typer.Option(help="Folder with train.csv, val.csv, test.csv and the images: in images/, or a folder a label."),
    ],
    out: Out = "data/mini-imagenet",
    size: Size = 84,
    skip_bad: SkipBad = False,
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
    fresh: Fresh = False,
) -> None:
    """mini-ImageNet from your own copy, by the split of Ravi and Larochelle: 64 train, 16 val, 20 test classes."""
    with _exit_codes():
        from pipelines import prepare

        prepare.prepare_mini_imagenet(_storage(out, endpoint, anonymous, retry_seconds), source, size, skip_bad, fresh)


@prepare_app.command("folder")
def prepare_folder(
    source: Annotated[
        str,
        typer.Option(help="Folder with a folder of images for each class, or with such folders in train, val, test."),
    ],
    out: Out,
    name: Annotated[str, typer.Option(help="Of the data set.")] = "images",
    size: Size = 84,
    grey: Annotated[bool, typer.Option("--grey", help="One channel instead of three.")] = False,
    seed: Annotated[int, typer.Option(help="Of the split of classes, where the folder has none.")] = 0,
    parts: Annotated[
        tuple[int, int, int], typer.Option(help="Train, val and test classes in proportion, where the folder has none.")
    ] = (64, 16, 20),
    skip_bad: SkipBad = False,
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
    fresh: Fresh = False,
) -> None:
    """Any PNG and JPEG images, a folder for each class."""
    with _exit_codes():
        from pipelines import prepare

        storage = _storage(out, endpoint, anonymous, retry_seconds)
        prepare.prepare_folder(storage, source, name, (size, grey), seed, parts, skip_bad, fresh)


@prepare_app.command("shards")
def prepare_shards(
    out: Out,
    name: Annotated[str, typer.Option(help="Of the data set.")] = "shards",
    endpoint: Endpoint = None,
    anonymous: Anonymous = False,
    retry_seconds: RetrySeconds = 60.0,
) -> None:
    """Index shards that you wrote with webdataset (train-000000.tar, ...), where they are."""
    with _exit_codes():
        from pipelines import prepare

        prepare.prepare_shards(_storage(out, endpoint, anonymous, retry_seconds), name)


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
) -> None:
    """Meta-train, meta-test and report. The same command again resumes."""
    with _exit_codes(orderly=True):
        from pipelines.repeats import train_seeds
        from pipelines.train import train as run_training

        overrides = [*(set_ or []), *([f"run.backend={backend}"] if backend else [])]
        overrides += ["run.profile=10"] if profile else []
        arguments = (config, overrides, run_dir, fresh)
        if not (run_training(*arguments) if seeds == 1 else train_seeds(*arguments, seeds)):
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
    sweep_dir: Annotated[Path | None, typer.Option(help="Where the sweep is kept; runs/<name> if not given.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier sweep in the same directory and start over.")
    ] = False,
) -> None:
    """Search hyperparameters with Ray Tune; every trial is a run of its own. The same command again resumes."""
    with _exit_codes(orderly=True):
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
    with _exit_codes():
        from imaml_dist.tracking.metrics_file import finite
        from pipelines.evaluate import evaluate_run

        result = evaluate_run(run, split, tasks, manifest)
        if json_file is not None:
            json_file.write_text(json.dumps(finite(result), indent=1) + "\n", encoding="utf-8")


@app.command("freeze-tasks")
def freeze_tasks(
    config: Annotated[Path, typer.Argument(help="Configuration file.", show_default=False)],
    out: Annotated[str, typer.Option("--out", help="Manifest to write: a path, file:// or s3:// URL.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 600,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.field=value.")] = None,
) -> None:
    """Write the tasks of an evaluation down, so that others can evaluate on exactly these."""
    with _exit_codes():
        from pipelines.freeze_tasks import freeze_tasks as freeze

        freeze(config, set_ or [], out, split, tasks)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run directory, or several to compare.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Page that compares several; comparison.html if not given.")
    ] = None,
) -> None:
    """Write RUN/report.html, one file with everything worth looking at; of several runs, one page that compares them."""
    with _exit_codes():
        from pipelines.report import compare_runs, report_run

        if len(runs) == 1 and out is not None:
            raise InputError(
                f"--out {out}: a single run's report is RUN/report.html; leave --out away, or give more runs"
            )
        page = report_run(runs[0]) if len(runs) == 1 else compare_runs(runs, out or Path("comparison.html"))
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
    with _exit_codes():
        from pipelines.verify import verify as run_verification

        run_verification(_storage(url, endpoint, anonymous, retry_seconds))


@app.command("mlflow-sync")
def mlflow_sync(run: Run) -> None:
    """Send to MLflow what a run could not send while the server was away."""
    with _exit_codes():
        from pipelines.mlflow_sync import sync

        sync(run)


def main() -> None:
    """Entry point of the `imaml` console script."""
    try:
        app()
    finally:
        if _leave_at_once:  # Python would wait for threads that still fetch, for as long as storage has patience
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
