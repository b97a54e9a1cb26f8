"""mini-ImageNet: 100 classes of 600 photographs, by the split that the field uses.

Source: Ravi and Larochelle, "Optimization as a model for few-shot learning" (2017), whose three CSV files (columns `filename`
and `label`) say which image belongs where. The images are the user's own copy.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from imaml_dist.data.index import SPLITS
from imaml_dist.data.prepare.decode import Form, image_class, source_digest
from imaml_dist.data.prepare.folder import key_of, refuse_escape
from imaml_dist.data.records import LazyRecord
from imaml_dist.errors import DataError

NAME = "mini-imagenet"
CLASSES = {"train": 64, "val": 16, "test": 20}
IMAGES = 600
"""Per class."""

_MAX_CSV_BYTES = 16 << 20


def mini_imagenet_splits(
    source: Path, form: Form, *, skip_bad: bool = False
) -> tuple[dict[str, list[LazyRecord]], str]:
    """Read the split; images are decoded when they are written.

    Args:
        source: folder with `train.csv`, `val.csv` and `test.csv`, and the images in `images/`, or in a folder for each label here
            or in `images/`.
        form: of the images.
        skip_bad: leave out images that are missing or cannot be read.

    Returns:
        Records by split, and the sha256 of the images' labels, names and sizes.

    Raises:
        DataError: a CSV file or an image is missing, or the split is not 64, 16 and 20 classes of 600 images.
    """
    splits = {}
    for split in SPLITS:
        images = _images(source / f"{split}.csv")
        sizes = {len(names) for names in images.values()}
        if len(images) != CLASSES[split] or sizes != {IMAGES}:
            raise DataError(
                f"--source: {source / split}.csv lists {len(images)} classes of {min(sizes, default=0)} to {max(sizes, default=0)} images, "
                f"mini-ImageNet has {CLASSES[split]} of {IMAGES}; take the CSV files of Ravi and Larochelle, or prepare the images as "
                "a folder"
            )
        splits[split] = [
            image_class(
                key_of(label),
                [_find(source, label, name, skip_bad) for name in names],
                source,
                form,
                skip_bad=skip_bad,
                name=label,
            )
            for label, names in images.items()
        ]
    return splits, source_digest(splits)


def _images(path: Path) -> dict[str, dict[str, None]]:
    """File names by label."""
    try:
        if path.stat().st_size > _MAX_CSV_BYTES:
            raise DataError(
                f"--source: {path} is larger than {_MAX_CSV_BYTES >> 20} MiB, which a split is not; check it"
            )
        content = path.read_bytes()
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for row in csv.DictReader(content.decode("utf-8-sig").splitlines()):
            name, label = row["filename"], row["label"]
            if not _is_plain(name) or not _is_plain(label) or key_of(label) != label:
                raise DataError(
                    f"--source: {path} has the file name {name!r} of label {label!r}: not plain names; check it"
                )
            if name in found[label]:
                raise DataError(f"--source: {path} lists {name!r} of label {label!r} twice; remove one line")
            found[label][name] = None
    except FileNotFoundError as error:
        raise DataError(
            f"--source: {path} does not exist; give the folder that holds train.csv, val.csv, test.csv and the images"
        ) from error
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(
            f"--source: {path} cannot be read as a CSV file with the columns filename and label ({type(error).__name__}: {error})"
        ) from error
    return found


def _is_plain(name: str | None) -> bool:
    return bool(name) and name == Path(str(name)).name and str(name)[0] != "."


def _find(source: Path, label: str, name: str, skip_bad: bool) -> Path:
    places = [source / "images" / name, source / label / name, source / "images" / label / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None and not skip_bad:
        raise DataError(
            f"--source: the image {name} of class {label} is neither in {places[0].parent}, {places[1].parent} nor {places[2].parent}; "
            "copy it there, or leave it out with --skip-bad"
        )
    if found is not None:
        refuse_escape(found, source.resolve())
    return found or places[0]
