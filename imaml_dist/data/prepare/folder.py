"""Any folder of images: one folder a class, split into train, val and test by the user or by a seed."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from imaml_dist.data.index import SPLITS
from imaml_dist.data.philox import Domain, Stream
from imaml_dist.data.prepare.decode import SUFFIXES, Form, image_class, source_digest
from imaml_dist.data.records import LazyRecord
from imaml_dist.errors import DataError

PARTS = (64, 16, 20)
"""Train, val and test classes out of a hundred, where the folder does not say."""


def folder_splits(
    source: Path, form: Form, *, seed: int = 0, parts: Sequence[int] = PARTS, skip_bad: bool = False
) -> tuple[dict[str, list[LazyRecord]], str]:
    """Find the classes below a folder; their images are decoded when they are written.

    A class is a folder with images in it or below it. If the source holds `train`, and beside it nothing but `val` and `test`,
    these are the splits, and classes lie in them. Else all classes, in bytewise order of their keys, are shuffled once by the
    drawing rule of `philox` (domain CLASS_POOL, step 0, task 0) and cut in proportion to `parts`, each split with a part having
    one class at least.

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
    if not given and len(inner & set(SPLITS)) > 1:
        other = min(inner - set(SPLITS), default="no 'train'")
        raise DataError(
            f"--source: beside {' and '.join(sorted(inner & set(SPLITS)))}, {source} holds {other}; the folders of a split are train, val "
            "and test, and nothing else is beside them"
        )
    if given:
        found = {split: _classes(source / split, source) for split in SPLITS if split in inner}
    else:
        found = _shuffled(_classes(source, source), source, seed, parts)
    splits = {
        split: [image_class(key, files, source, form, skip_bad=skip_bad) for key, files in classes.items()]
        for split, classes in found.items()
    }
    return splits, source_digest(splits)


def _classes(folder: Path, root: Path) -> dict[str, list[Path]]:
    """Images by class key."""
    found: dict[str, list[Path]] = defaultdict(list)
    came_from: dict[str, str] = {}
    for path in _image_files(folder, root):
        name, *inner = path.relative_to(folder).parts
        if not inner:
            raise DataError(f"--source: {path} is in no class's folder; move it into one, or remove it")
        key = key_of(name)
        if came_from.setdefault(key, name) != name:
            raise DataError(
                f"--source: the folders {came_from[key]!r} and {name!r} in {folder} would both be class {key!r}; rename one of them"
            )
        found[key].append(path)
    if not found:
        raise DataError(
            f"--source: {folder} holds no folder with images ({', '.join(SUFFIXES)}); give one with a folder for each class"
        )
    return found


def _image_files(folder: Path, root: Path) -> Iterable[Path]:
    """Images below a folder.

    Raises:
        DataError: a folder is a link, or an image lies outside of `root` behind one.
    """
    inside = root.resolve()
    if folder != root and folder.is_symlink():
        raise _linked(folder)
    for current, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=os.fsencode)
        for name in folders:  # which would be passed over in silence
            if (Path(current) / name).is_symlink():
                raise _linked(Path(current) / name)
        for name in files:
            path = Path(current) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink():
                refuse_escape(path, inside)
            yield path


def refuse_escape(path: Path, inside: Path) -> None:
    """Refuse an image that links lead to from outside of a (resolved) folder.

    Raises:
        DataError: they do.
    """
    if not path.resolve().is_relative_to(inside):
        raise DataError(f"--source: {path} is a link that leads out of {inside}; put the image itself there")


def _refuse(error: OSError) -> None:
    raise error


def _linked(folder: Path) -> DataError:
    return DataError(f"--source: {folder} is a link to a folder; put the folder itself there")


def key_of(name: str) -> str:
    """A folder's name as a class key: letters, digits, `_` and `-` stay, all else becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_\-]", "_", name)


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
    if not 0 <= seed < 2**63:
        raise DataError(f"--seed: {seed} given, seeds are 0 to 2^63 - 1")
    order = Stream(seed, Domain.CLASS_POOL, 0, 0).sample(len(keys), len(keys))
    counts = [max(int(part > 0), len(keys) * part // sum(parts)) for part in parts]
    counts[0] = len(keys) - sum(counts[1:])
    while counts[0] < 1:
        counts[counts.index(max(counts))] -= 1
        counts[0] += 1
    found, begin = {}, 0
    for split, count in zip(SPLITS, counts, strict=True):
        if count:
            found[split] = {keys[i]: classes[keys[i]] for i in order[begin : begin + count]}
        begin += count
    return found
