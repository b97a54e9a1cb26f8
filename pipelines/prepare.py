"""`imaml prepare`: raw images -> class-record shards. Running it again on finished work changes nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.index import FILE_NAME
from imaml_dist.data.prepare import glyphs, omniglot
from imaml_dist.data.records import ClassRecord
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import DataError
from imaml_dist.storage.local import local_path
from pipelines import console

Splits = Mapping[str, Sequence[ClassRecord]]


def prepare_glyphs(url: str, seed: int) -> None:
    """Render the embedded data set from the fonts inside matplotlib."""
    folder = local_path(url)
    wanted = {
        "kind": "glyphs",
        "seed": seed,
        "matplotlib": importlib.metadata.version("matplotlib"),
        "pillow": importlib.metadata.version("pillow"),
    }
    if _is_done(folder, wanted):
        return
    with console.progress("rendering glyphs") as show:
        splits = glyphs.glyph_splits(seed=seed, progress=lambda done, total: show(done, total, ""))
    _write(folder, glyphs.GLYPH_NAME, splits, wanted)


def prepare_omniglot(url: str, source: str | None, seed: int) -> None:
    """Read Omniglot from the official archives, downloading them first if no source is given."""
    folder = local_path(url)
    wanted = {"kind": "omniglot", "seed": seed, "pillow": importlib.metadata.version("pillow")}
    if _is_done(folder, wanted, ignore=("sha256",)):
        return
    if source is None or source.startswith(("http://", "https://")):
        with console.progress("downloading Omniglot") as show:
            source = str(
                omniglot.fetch(
                    source or omniglot.OFFICIAL_URL, folder / "download", lambda what, a, b: show(a, b, what)
                )
            )
    with console.progress("reading Omniglot") as show:
        splits, digests = omniglot.omniglot_splits(source, seed, lambda what, done, total: show(done, total, ""))
    _write(folder, omniglot.NAME, splits, {**wanted, "sha256": digests}, rotations=omniglot.ROTATIONS)


def _is_done(folder: Path, wanted: Mapping[str, Any], ignore: Sequence[str] = ()) -> bool:
    """Whether the folder already holds exactly this data set, whole; another one is never overwritten."""
    if not (folder / FILE_NAME).is_file():
        return False
    try:
        dataset = Dataset(str(folder))
    except DataError as error:
        console.err.print(f"preparing again: {error}", soft_wrap=True)
        return False
    found = {key: value for key, value in dataset.index.provenance.items() if key not in ignore}
    if found.get("kind") != wanted["kind"]:
        raise DataError(f"{folder} already holds the data set {dataset.index.name!r}; choose another --out")
    if found != dict(wanted):
        console.err.print(f"{folder} was made with {found}, preparing again with {dict(wanted)}", soft_wrap=True)
        return False
    console.out.print(f"{folder} is already prepared: {_described(dataset)}", soft_wrap=True)
    return True


def _write(
    folder: Path, name: str, splits: Splits, provenance: Mapping[str, Any], rotations: Mapping[str, int] | None = None
) -> None:
    with console.progress("writing shards") as show:
        counted: Callable[[int, int], None] = lambda done, total: show(done, total, "")  # noqa: E731
        write_dataset(folder, name, splits, provenance, rotations=rotations, progress=counted)
    console.out.print(f"{folder}: {_described(Dataset(str(folder)))}", soft_wrap=True)


def _described(dataset: Dataset) -> str:
    counts = ", ".join(f"{len(classes)} {split} classes" for split, classes in dataset.index.splits.items())
    return f"{dataset.index.name} with {counts}, fingerprint {dataset.index.fingerprint[:12]}"
