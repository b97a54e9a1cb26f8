"""`imaml prepare`: raw images -> class-record shards. Running it again on finished work changes nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from imaml_dist.data.cache import default_folder
from imaml_dist.data.index import SPLITS, Index, read_index
from imaml_dist.data.prepare import folder, glyphs, mini_imagenet, omniglot, own_shards
from imaml_dist.data.prepare.decode import Form
from imaml_dist.data.publishing import check_replaceable
from imaml_dist.data.records import AnyRecord
from imaml_dist.data.shards import SKIPPED_NAME, write_dataset
from imaml_dist.errors import ConfigError, DataError, MissingError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.local import local_path
from imaml_dist.storage.protocol import Storage
from pipelines import console

Splits = Mapping[str, Sequence[AnyRecord]]


def prepare_glyphs(storage: Storage, seed: int, fresh: bool) -> None:
    """Render the embedded data set from the fonts inside matplotlib."""
    wanted = {
        "kind": "glyphs",
        "seed": seed,
        "matplotlib": importlib.metadata.version("matplotlib"),
        "pillow": importlib.metadata.version("pillow"),
    }
    if _is_done(storage, wanted, fresh):
        return
    with console.progress("rendering glyphs") as show:
        splits = glyphs.glyph_splits(seed=seed, progress=lambda done, total: show(done, total, ""))
    _write(storage, glyphs.GLYPH_NAME, splits, wanted)


def prepare_omniglot(storage: Storage, source: str | None, seed: int, fresh: bool) -> None:
    """Read Omniglot from the official archives, downloading them first if no source is given."""
    wanted = {"kind": "omniglot", "seed": seed, "pillow": importlib.metadata.version("pillow")}
    if _is_done(storage, wanted, fresh, ignore=("sha256",)):
        return
    if source is None or source.startswith(("http://", "https://")):
        downloads = storage.path / "download" if isinstance(storage, Folder) else default_folder() / "omniglot"
        with console.progress("downloading Omniglot") as show:
            source = str(
                omniglot.fetch(source or omniglot.OFFICIAL_URL, downloads, lambda what, a, b: show(a, b, what))
            )
    with console.progress("reading Omniglot") as show:
        splits, digests = omniglot.omniglot_splits(source, seed, lambda what, done, total: show(done, total, ""))
    _write(storage, omniglot.NAME, splits, {**wanted, "sha256": digests}, rotations=omniglot.ROTATIONS)


def prepare_mini_imagenet(storage: Storage, source: str, size: int, skip_bad: bool, fresh: bool) -> None:
    """Bring mini-ImageNet into shards, from the user's own copy of its images and the split's CSV files."""
    form = _form(size, grey=False)
    splits, digest = mini_imagenet.mini_imagenet_splits(local_path(source), form, skip_bad=skip_bad)
    settings = {"kind": mini_imagenet.NAME, "size": size, **_decoder()}
    _prepare_images(storage, mini_imagenet.NAME, splits, settings, {"skip_bad": skip_bad, "sha256": digest}, fresh)


def prepare_folder(
    storage: Storage,
    source: str,
    name: str,
    form: tuple[int, bool],
    seed: int,
    parts: Sequence[int],
    skip_bad: bool,
    fresh: bool,
) -> None:
    """Bring a folder of images into shards."""
    size, grey = form
    splits, digest = folder.folder_splits(
        local_path(source), _form(size, grey), seed=seed, parts=parts, skip_bad=skip_bad
    )
    settings = {"kind": "folder", "size": size, "grey": grey, **_decoder()}
    facts = {"name": name, "seed": seed, "parts": list(parts), "skip_bad": skip_bad, "sha256": digest}
    _prepare_images(storage, name, splits, settings, facts, fresh)


def _prepare_images(
    storage: Storage, name: str, splits: Splits, settings: Mapping[str, Any], facts: Mapping[str, Any], fresh: bool
) -> None:
    """`settings` decide about the bytes of a shard, together with its images; so one mended image does not undo the others."""
    wanted = {**settings, **facts}
    if not _is_done(storage, wanted, fresh, ignore=("skipped",)):
        _write(storage, name, splits, wanted, settings=settings)


def prepare_shards(storage: Storage, name: str) -> None:
    """Give shards that the user wrote an index."""
    with console.progress("reading shards") as show:
        index, there = own_shards.index_shards(storage, name, lambda done, total: show(done, total, ""))
    already = "is already prepared: " if there else ""
    console.out.print(f"{storage.url}: {already}{_described(index)}", soft_wrap=True)


def _form(size: int, grey: bool) -> Form:
    if not 1 <= size <= 1024:
        raise ConfigError(f"--size: {size} given, images have 1 to 1024 pixels a side")
    return Form(size, grey)


def _decoder() -> dict[str, str]:
    return {"pillow": importlib.metadata.version("pillow")}


def _is_done(storage: Storage, wanted: Mapping[str, Any], fresh: bool, ignore: Sequence[str] = ()) -> bool:
    """Whether exactly this data set is already there, with all of its shards; one of another kind is never overwritten."""
    try:
        index = read_index(storage)
    except DataError as error:
        if not isinstance(error.__cause__, MissingError):
            check_replaceable(storage, wanted["kind"], error)
            console.err.print(f"preparing again: {error}", soft_wrap=True)
        return False
    found = {key: value for key, value in index.provenance.items() if key not in ignore}
    if found.get("kind") != wanted["kind"]:
        raise DataError(f"{storage.url} already holds the data set {index.name!r}; choose another --out")
    why = _difference(found, wanted) or ("--fresh" if fresh else _missing(storage, index))
    if why:
        console.err.print(f"{storage.url}: preparing again ({why})", soft_wrap=True)
        return False
    console.out.print(f"{storage.url} is already prepared: {_described(index)}", soft_wrap=True)
    return True


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What decided about the data set that is there, and is now asked for otherwise."""
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return ", ".join(f"{key}: {_short(found.get(key))} -> {_short(wanted.get(key))}" for key in differing)


def _short(value: Any) -> str:
    return str(value)[:16]  # enough to tell digests apart


def _missing(storage: Storage, index: Index) -> str:
    """Which shard is not there as the index says, by its size alone; `imaml verify` reads it."""
    for shard in index.shards:
        try:
            if storage.stat(shard.name).size != shard.size:
                return f"shard {shard.name} has another size than the index says"
        except MissingError as error:
            return str(error)
    return ""


def _write(
    storage: Storage,
    name: str,
    splits: Splits,
    provenance: Mapping[str, Any],
    rotations: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    with console.progress("writing classes") as show:
        index = write_dataset(
            storage,
            name,
            splits,
            provenance,
            settings=settings,
            rotations=rotations,
            progress=lambda done, total: show(done, total, ""),
        )
    try:
        skipped = storage.read(SKIPPED_NAME).decode().splitlines()
    except MissingError:
        skipped = []
    for line in skipped:
        console.err.print(f"skipped: {line}", soft_wrap=True)
    if skipped:
        where = f"{storage.url}/{SKIPPED_NAME}"
        console.err.print(f"{len(skipped)} images were skipped; they are listed in {where}", soft_wrap=True)
    console.out.print(f"{storage.url}: {_described(index)}", soft_wrap=True)
    for split, classes in index.splits.items():
        if len(classes) < 2:
            console.err.print(
                f"the {split} split has {len(classes)} class, an episode needs two: see --parts", soft_wrap=True
            )


def _described(index: Index) -> str:
    splits = [split for split in SPLITS if split in index.splits]
    counts = ", ".join(f"{len(index.splits[split])} {split} classes" for split in splits)
    images = sum(entry.shape[0] for split in splits for entry in index.splits[split] if entry.rot == 0)
    return f"{index.name} with {counts}, {images} images, fingerprint {index.fingerprint[:12]}"
