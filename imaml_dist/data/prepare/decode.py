"""Image files -> arrays of one size: PNG and JPEG only, bounded before anything is decoded, several at once."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from imaml_dist.data.records import ClassRecord, Images, LazyRecord
from imaml_dist.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_BYTES, MAX_PIXELS = 32 << 20, 16 << 20
"""Of one file, and of the image in it."""


@dataclass(frozen=True)
class Form:
    """What every image of a data set is brought into.

    Attributes:
        size: pixels of each side; the largest centred square is cut out, then resized (Lanczos). 1 to 1024.
        grey: one channel instead of three.
    """

    size: int = 84
    grey: bool = False

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.grey else 3


def decode(path: Path, form: Form) -> Images:
    """One image, `[size, size, channels]` uint8, upright as its EXIF says.

    Raises:
        DataError: it is no PNG or JPEG that can be read, or larger than allowed.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB; shrink it, or leave it out")
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed; shrink it, or leave it out"
                )
            upright = ImageOps.exif_transpose(image).convert("L" if form.grey else "RGB")
            side = (form.size, form.size)
            fitted = ImageOps.fit(upright, side, Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is not a readable PNG or JPEG image ({type(error).__name__}: {error}); replace it, or leave it out with --skip-bad"
        ) from error
    return np.asarray(fitted, dtype=np.uint8).reshape(form.size, form.size, form.channels)


def image_class(
    key: str, files: Sequence[Path], root: Path, form: Form, *, skip_bad: bool, name: str = ""
) -> LazyRecord:
    """A class whose images are decoded when it is written, in bytewise order of their paths.

    Args:
        key: of the class.
        files: its images.
        root: what their paths are relative to, in the record.
        form: of the images.
        skip_bad: leave out what cannot be read, instead of stopping.
        name: for people; the key if empty.

    Raises (when loaded):
        DataError: an image cannot be read; or fewer than two of the class can.
    """
    ordered = sorted(files, key=lambda path: os.fsencode(path.relative_to(root)))

    def load() -> ClassRecord:
        images, sources, skipped = [], [], []
        for path, decoded in zip(ordered, _threads().map(lambda path: _tried(path, form), ordered), strict=True):
            if isinstance(decoded, DataError):
                if not skip_bad:
                    raise decoded
                skipped.append(str(decoded))
            else:
                images.append(decoded)
                sources.append(path.relative_to(root).as_posix())
        if len(images) < 2:
            raise DataError(
                f"class {key!r} has {len(images)} readable images, at least 2 are needed; add some, or remove it"
            )
        return ClassRecord(key, np.stack(images), name or key, tuple(sources), tuple(skipped))

    return LazyRecord(key, (len(files), form.size, form.size, form.channels), load)


def _tried(path: Path, form: Form) -> Images | DataError:
    try:
        return decode(path, form)
    except DataError as error:
        return error


@cache
def _threads() -> ThreadPoolExecutor:
    # Decoding leaves Python's lock to others.
    return ThreadPoolExecutor(os.cpu_count(), "decode")
