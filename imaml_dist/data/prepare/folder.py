"""Any folder of images: one folder a class, split into train, val and test by the user or by a seed."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from imaml_dist.data.index import SPLITS
from imaml_dist.data.philox import Domain, Stream
from imaml_dist.data.prepare.decode import SUFFIXES, Form, image_class
from imaml_dist.data.records import LazyRecord
from imaml_dist.errors import DataError

PARTS = (64, 16, 20)
"""Train, val and test classes out of a hundred, where the folder does not say."""


def folder_splits(
    source: Path, form: Form, *, seed: int = 0, parts: Sequence[int] = PARTS, skip_bad: bool = False
) -> tuple[dict[str, list[LazyRecord]], str]:
    """Find the classes below a folder; their images are decoded when they are written.

    A class is a folder with images in it. If the folder holds `train`, and beside it nothing but `val` and `test`, these are the
    splits. Else all classes, in bytewise order of their keys, are shuffled once by the drawing rule of `philox` (domain
    CLASS_POOL, step 0, task 0) and cut in proportion to `parts`, each split with a part having one class at least.

    Args:
        source: the folder.
        form: of the images.
        seed: of the shuffle.
        parts: of train, val and test.
        skip_bad: leave out images that cannot be read.

    Returns:
        Records by split, and the sha256 of the images' names and sizes.

    Raises:
        DataError: there is no such folder, no class, too few classes, two of one key, or a link that leads out of the folder.
    """
    if not source.is_dir():
        raise DataError(f"--source: there is no folder {source}; give the folder that holds the classes")
    inner = {entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    given = "train" in inner and inner <= set(SPLITS)
    digest = hashlib.sha256()
    if given:
        found = {split: _classes(source / split, source, digest) for split in SPLITS if split in inner}
    else:
        found = _shuffled(_classes(source, source, digest), source, seed, parts)
    splits = {
        split: [image_class(key, files, source, form, skip_bad=skip_bad) for key, files in classes.items()]
        for split, classes in found.items()
    }
    return splits, digest.hexdigest()


def _classes(folder: Path, root: Path, digest: hashlib._Hash) -> dict[str, list[Path]]:
    """Images by class key."""
    found: dict[str, list[Path]] = defaultdict(list)
    came_from: dict[str, Path] = {}
    for path in image_files(folder, root, digest):
        key = key_of(path.parent.relative_to(folder))
        if came_from.setdefault(key, path.parent) != path.parent:
            raise DataError(
                f"--source: the folders {came_from[key]} and {path.parent} would both be class {key!r}; rename one of them"
            )
        found[key].append(path)
    if not found:
        raise DataError(
            f"--source: {folder} holds no folder with images ({', '.join(SUFFIXES)}); give one with a folder for each class"
        )
    return found


def image_files(folder: Path, root: Path, digest: hashlib._Hash) -> Iterable[Path]:
    """Images below a folder in bytewise order, each noted in the digest.

    Raises:
        DataError: an image lies outside of `root`, behind a link.
    """
    inside = root.resolve()
    for current, folders, files in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=os.fsencode)
        for name in sorted(files, key=os.fsencode):
            path = Path(current) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise DataError(f"--source: {path} is a link that leads out of {root}; put the image itself there")
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"--source: {path} cannot be read ({error.strerror}); mend or remove it") from error
            digest.update(os.fsencode(path.relative_to(root)) + f"\0{size}\n".encode())
            yield path


def key_of(folder: Path) -> str:
    """A folder's path as a class key, which may hold letters, digits, `_`, `-` and `/` only."""
    return re.sub(r"[^A-Za-z0-9_\-/]", "_", folder.as_posix()) if folder.parts else "_"


def _shuffled(
    classes: dict[str, list[Path]], source: Path, seed: int, parts: Sequence[int]
) -> dict[str, dict[str, list[Path]]]:
    if len(parts) != len(SPLITS) or min(parts) < 0 or parts[0] < 1:
        raise DataError(f"--parts: {list(parts)} given, three numbers are needed, as in 64 16 20, the first at least 1")
    keys = sorted(classes, key=str.encode)
    needed = sum(part > 0 for part in parts)
    if len(keys) < needed:
        raise DataError(
            f"--source: {source} holds {len(keys)} classes, at least {needed} are needed for {needed} splits; add classes, or set a "
            "part to 0"
        )
    order = Stream(seed, Domain.CLASS_POOL, 0, 0).sample(len(keys), len(keys))
    counts = [max(int(part > 0), len(keys) * part // sum(parts)) for part in parts]
    counts[0] = len(keys) - sum(counts[1:])
    found, begin = {}, 0
    for split, count in zip(SPLITS, counts, strict=True):
        if count:
            found[split] = {keys[i]: classes[keys[i]] for i in order[begin : begin + count]}
        begin += count
    return found
