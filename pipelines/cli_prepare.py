"""`imaml prepare ...`: raw images -> class-record shards."""

from __future__ import annotations

from typing import Annotated

import typer

from imaml_dist.errors import InputError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import Storage
from pipelines.exit_codes import exit_codes

prepare_app = typer.Typer(no_args_is_help=True, help="Raw images -> class-record shards.")

Out = Annotated[str, typer.Option("--out", help="Where to write: a path, file:// or s3:// URL.")]
Endpoint = Annotated[str | None, typer.Option(help="URL of an S3-compatible server; AWS_ENDPOINT_URL_S3 if not given.")]
Size = Annotated[int, typer.Option(help="Pixels of each side, after cutting out the largest centred square.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")]
RetrySeconds = Annotated[float, typer.Option(min=0, help="How long storage may go on failing without progress.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Prepare again what is there already, to mend damage.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Sign no requests, for public buckets.")]


def storage_of(url: str, endpoint: str | None, anonymous: bool, retry_seconds: float) -> Storage:
    """The storage that a command's options describe."""
    return open_storage(url, StorageOptions(endpoint=endpoint, anonymous=anonymous, retry_seconds=retry_seconds))


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed: {seed} given, seeds are 0 to 2^64 - 1")
    return seed


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
    with exit_codes():
        from pipelines import prepare

        prepare.prepare_glyphs(storage_of(out, endpoint, anonymous, retry_seconds), _seed(seed), fresh)


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
    with exit_codes():
        from pipelines import prepare

        prepare.prepare_omniglot(storage_of(out, endpoint, anonymous, retry_seconds), source, _seed(seed), fresh)


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
    with exit_codes():
        from pipelines import prepare

        prepare.prepare_mini_imagenet(
            storage_of(out, endpoint, anonymous, retry_seconds), source, size, skip_bad, fresh
        )


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
    with exit_codes():
        from pipelines import prepare

        storage = storage_of(out, endpoint, anonymous, retry_seconds)
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
    with exit_codes():
        from pipelines import prepare

        prepare.prepare_shards(storage_of(out, endpoint, anonymous, retry_seconds), name)
