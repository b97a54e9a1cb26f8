"""Image files -> arrays of one size: PNG and JPEG only, bounded before anything is decoded, several at once."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from imaml_dist.data.records import ClassRecord, Images, LazyRecord
from imaml_dist.errors import DataError, brief

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_BYTES, MAX_PIXELS = 32 << 20, 16 << 20
"""Of one file, and of the image in it."""

# Of images that are refused or mended below; set once, as filters belong to the process and images are read by threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


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


class _BadImageError(Exception):
    """An image cannot be used; the message says why, without the path, so that it is the same on all machines."""


def decode(path: Path, form: Form) -> Images:
    """One image, `[size, size, channels]` uint8, upright as its EXIF says.

    Raises:
        DataError: it is no PNG or JPEG that can be read, or larger than allowed.
    """
    try:
        return _decoded(path, form)
    except _BadImageError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: _BadImageError) -> DataError:
    return DataError(f"{path} {error}; replace it, or leave out all that cannot be read with --skip-bad")


def _decoded(path: Path, form: Form) -> Images:
    try:
        with open(path, "rb", opener=_at_once) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _BadImageError(f"is larger than {MAX_BYTES >> 20} MiB")
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _BadImageError(f"has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are allowed")
            upright = _of_8_bits(ImageOps.exif_transpose(image)).convert("L" if form.grey else "RGB")
            side = (form.size, form.size)
            fitted = ImageOps.fit(upright, side, Image.Resampling.LANCZOS)
    except _BadImageError:
        raise
    except Exception as error:  # Pillow raises what its parsers raise
        raise _BadImageError(f"is not a readable PNG or JPEG image ({_why(error)})") from error
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

    Raises:
        DataError: the class has fewer than two images. When loaded: fewer than two can be read; or one cannot, without `skip_bad`.
    """
    ordered = sorted(files, key=lambda path: os.fsencode(path.relative_to(root)))
    _check_count(key, len(ordered))

    def load() -> ClassRecord:
        images, sources, skipped = [], [], []
        for path, decoded in zip(ordered, _threads().map(lambda path: _tried(path, form), ordered), strict=True):
            source = path.relative_to(root).as_posix()
            if not isinstance(decoded, _BadImageError):
                images.append(decoded)
                sources.append(source)
            elif skip_bad:
                skipped.append(f"{source} {decoded}".replace("\n", "\\n"))
            else:
                raise _refused(path, decoded)
        _check_count(key, len(images))
        return ClassRecord(key, np.stack(images), name or key, tuple(sources), tuple(skipped))

    shape = (len(files), form.size, form.size, form.channels)
    return LazyRecord(key, shape, load, _digest(ordered, root), skip_bad)


def source_digest(splits: Mapping[str, Iterable[LazyRecord]]) -> str:
    """sha256 in hex over classes, file names and sizes: what tells one source from another without reading it."""
    listed = [[split, sorted([record.key, record.digest] for record in records)] for split, records in splits.items()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _digest(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        digest.update(os.fsencode(path.relative_to(root)) + f"\0{size}\n".encode())
    return digest.hexdigest()


def _check_count(key: str, images: int) -> None:
    if images < 2:
        raise DataError(f"class {key!r} has {images} readable images, at least 2 are needed; add some, or remove it")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The upper eight bits of sixteen, where Pillow would cut off whatever is above 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _at_once(path: str, flags: int) -> int:
    """Opens a file, and a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose own words have an address in them
        return "it is in another format, or none"
    if isinstance(error, OSError) and error.strerror:  # and here a path
        return f"{type(error).__name__}: {error.strerror}"
    return brief(error)


def _tried(path: Path, form: Form) -> Images | _BadImageError:
    try:
        return _decoded(path, form)
    except _BadImageError as error:
        return error


@cache
def _threads() -> ThreadPoolExecutor:
    # Decoding leaves Python's lock to others.
    return ThreadPoolExecutor(os.cpu_count(), "decode")
