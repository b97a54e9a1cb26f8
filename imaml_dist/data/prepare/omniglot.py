"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each, from the official archives.

Source: Lake et al., "Human-level concept learning through probabilistic program induction" (2015); MIT licence.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import re
import urllib.request
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from imaml_dist.data.philox import Domain, Stream
from imaml_dist.data.records import ClassRecord
from imaml_dist.errors import DataError, StorageError
from imaml_dist.storage.local import local_path, without_secrets

NAME = "omniglot"
OFFICIAL_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ARCHIVES = {
    "images_background": "11fe9528747c7c7e6e4e8a597e6015975c0692e11b991a21a5b820b21617404b",
    "images_evaluation": "447d42e6f4de13c9ef0eeac3eada0977f53371785e6b809425a8a9691c724c07",
}
"""Official archives without `.zip` and their sha256; the folder inside has the same name."""

CHARACTERS, DRAWINGS, SIDE = 1623, 20, 28
SPLIT_SIZES = {"train": 1100, "val": 100, "test": 423}
ROTATIONS = {"train": 4, "val": 1, "test": 1}
"""Quarter turns that count as classes of their own: training only, as in the literature."""

_MEMBER = re.compile(r"(?:.*/)?images_(?:background|evaluation)/([^/]+)/(character\d+)/(\d+_\d+\.png)\Z")
_MAX_IMAGE_BYTES, _MAX_ARCHIVE_BYTES = 64 << 10, 64 << 20

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def fetch(url: str, folder: Path, progress: Progress | None = None) -> Path:
    """Download the official archives from below `url` into `folder`, verify their sha256, and return the folder.

    An archive that is there and verifies is not fetched again.

    Raises:
        StorageError: the server cannot be reached or answers with an error.
        DataError: what arrived is not the official archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in ARCHIVES.items():
        target = folder / f"{name}.zip"
        if target.is_file() and _sha256(target) == expected:
            continue
        if not url.startswith(("http://", "https://")):
            raise DataError(f"--source: {without_secrets(url)} is neither a path nor an http(s) URL")
        if "@" in re.split("[/?#]", url.partition("//")[2])[0]:  # errors of the library would quote them
            raise DataError(
                "--source: credentials do not belong in a URL; take them out, or pass a folder with the two official archives"
            )
        address = url if url.endswith(f"{name}.zip") else f"{url.rstrip('/')}/{name}.zip"
        part = target.with_suffix(".part")
        try:
            # S310: the scheme is checked above.
            with urllib.request.urlopen(address, timeout=60) as answer, open(part, "wb") as file:  # noqa: S310
                total, done = int(answer.headers.get("Content-Length") or 0), 0
                while block := answer.read(1 << 16):
                    done += len(block)
                    if done > _MAX_ARCHIVE_BYTES:
                        raise DataError(
                            f"{without_secrets(address)} is larger than {_MAX_ARCHIVE_BYTES} bytes: not the official archive"
                        )
                    file.write(block)
                    if progress is not None:
                        progress(f"download {name}", done, total)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise StorageError(
                f"{without_secrets(address)} cannot be downloaded ({error}); "
                "get the two official archives by hand and pass their folder as --source"
            ) from error
        if (found := _sha256(part)) != expected:
            part.unlink()
            raise DataError(
                f"{without_secrets(address)} arrived with sha256 {found[:12]}, the official archive has {expected[:12]}; "
                "try again or pass --source"
            )
        part.replace(target)
    return folder


def omniglot_splits(
    source: str, seed: int = 0, progress: Progress | None = None
) -> tuple[dict[str, list[ClassRecord]], dict[str, str]]:
    """Read the drawings, shrink them to 28x28 (Lanczos) with ink = 255, and split the characters.

    The 1,623 characters in order of their keys are shuffled once by the drawing rule of `philox` (domain CLASS_POOL,
    step 0, task 0) and cut into 1,100 train, 100 val and 423 test.

    Args:
        source: a folder with the two archives or the two unpacked folders, or one zip file with both folders.
        seed: of the shuffle.
        progress: called as images are read.

    Returns:
        Records by split, and the sha256 of each archive read, or of all image bytes of an unpacked folder.

    Raises:
        DataError: the source is missing, a file cannot be read, or it does not hold 1,623 characters x 20 drawings.
    """
    drawings: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    digests: dict[str, str] = {}
    done = 0
    for name, data in _image_files(local_path(source), digests):
        match = _MEMBER.match(name)
        if match is None:
            continue
        alphabet, character, drawing = match.groups()
        key = re.sub(r"[^A-Za-z0-9_\-]", "_", alphabet) + "/" + character
        drawings[key][drawing] = _decode(data, name)
        done += 1
        if progress is not None and done % 100 == 0:
            progress("read drawings", done, CHARACTERS * DRAWINGS)
    uneven = [key for key, images in drawings.items() if len(images) != DRAWINGS]
    if len(drawings) != CHARACTERS or uneven:
        raise DataError(
            f"{source} holds {len(drawings)} characters ({len(uneven)} of them without exactly {DRAWINGS} drawings), Omniglot has "
            f"{CHARACTERS} x {DRAWINGS}; give the folder of the two official archives {', '.join(a + '.zip' for a in ARCHIVES)}"
        )
    keys = sorted(drawings)
    order = [keys[i] for i in Stream(seed, Domain.CLASS_POOL, 0, 0).sample(len(keys), len(keys))]
    splits: dict[str, list[ClassRecord]] = {}
    for split, size in SPLIT_SIZES.items():
        chosen, order = order[:size], order[size:]
        splits[split] = [_record(key, drawings[key]) for key in chosen]
    return splits, digests


def _record(key: str, drawings: dict[str, np.ndarray]) -> ClassRecord:
    names = sorted(drawings)
    return ClassRecord(key=key, images=np.stack([drawings[n] for n in names]), name=key, sources=tuple(names))


def _image_files(source: Path, digests: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every image below a source; fills `digests` with what was read."""
    if source.is_file():
        archives = [source]
    elif source.is_dir():
        archives = [source / f"{name}.zip" for name in ARCHIVES if (source / f"{name}.zip").is_file()]
    else:
        raise DataError(
            f"--source: {source} does not exist; give the folder that holds the Omniglot archives or images"
        )
    for archive in archives:
        digests[archive.name] = _sha256(archive)
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    if _MEMBER.match(member.filename):
                        if member.file_size > _MAX_IMAGE_BYTES:
                            raise DataError(
                                f"{archive}: {member.filename} unpacks to {member.file_size} bytes, too large for a drawing"
                            )
                        yield member.filename, opened.read(member)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            NotImplementedError,  # zipfile: an unknown compression
            RuntimeError,
            ValueError,
        ) as error:
            raise DataError(f"{archive} cannot be read as a zip archive ({error}); copy it again") from error
    for folder in (source / name for name in ARCHIVES if not archives):
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*/character*/*.png")):
            data = path.read_bytes()
            digest.update(hashlib.sha256(data).digest())
            yield path.as_posix(), data
        digests[folder.name] = digest.hexdigest()


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (105, 105):
                raise DataError(f"{name} is {image.size[0]}x{image.size[1]} pixels, Omniglot drawings are 105x105")
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable PNG image ({error}); copy the archive again") from error
    return 255 - np.asarray(small, dtype=np.uint8)[:, :, None]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
