"""Frozen evaluation sets: the tasks of a split written down, so that anybody can evaluate on exactly these.

A manifest is a file of JSON lines. The first says what it is:

    {format, version, dataset, fingerprint, spec_version, seed, split, way, shot, query, tasks, sha256}

`sha256` is that of all bytes behind this line. Each line after it is a task, in order of their numbers:

    {task, classes: [key of a class, N times], images: [[K + Q image numbers], N times]}

A class's position is its label; the first K of its images are the support.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.episodes import DOMAINS, EpisodeSource
from imaml_dist.data.philox import SPEC_VERSION
from imaml_dist.data.publishing import version_of
from imaml_dist.errors import ChangedError, ConfigError, DataError, InputError, MissingError, brief
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.local import without_secrets
from imaml_dist.storage.opening import S3, open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import ABSENT, Storage

FORMAT = "imaml-frozen-tasks"
VERSION = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Manifest:
    """Frozen tasks as read.

    Attributes:
        dataset: name of the data set. fingerprint: of its index.
        seed, split, way, shot, query: of the draws, as in `EpisodeSource`.
        tasks: class keys, and for each its image numbers; task t is the t-th.
        sha256: of the whole file, in hex.
    """

    dataset: str
    fingerprint: str
    seed: int
    split: str
    way: int
    shot: int
    query: int
    tasks: tuple[tuple[list[str], list[list[int]]], ...]
    sha256: str


class FrozenTasks(EpisodeSource):
    """The tasks of a manifest as a `TaskSource`: what the source that was frozen gives for step 0, to the last bit.

    Args:
        dataset: opened data set.
        manifest: of tasks of this data set.
        dtype: of pixels.

    Attributes:
        sha256: of the manifest, in hex.

    Raises:
        DataError: the manifest belongs to another data set, or names classes or images that this one does not have.
    """

    def __init__(self, dataset: Dataset, manifest: Manifest, dtype: torch.dtype = torch.float32) -> None:
        if manifest.fingerprint != dataset.index.fingerprint:
            raise DataError(
                f"the manifest's tasks are of data set {manifest.dataset[:80]!r}, fingerprint {manifest.fingerprint[:12]!r}, "
                f"{dataset.url} is {dataset.index.name!r}, {dataset.index.fingerprint[:12]!r}; give the data set that was frozen"
            )
        classes = dataset.classes(manifest.split)
        number_of = {entry.key: number for number, entry in enumerate(classes)}
        self.sha256 = manifest.sha256
        self._tasks = []
        for task, (keys, images) in enumerate(manifest.tasks):
            for key, numbers in zip(keys, images, strict=True):
                if key not in number_of:
                    raise DataError(
                        f"task {task} of the manifest names class {key[:80]!r}, which the {manifest.split} split of {dataset.url} "
                        "does not have; freeze the tasks again"
                    )
                if max(numbers) >= (there := classes[number_of[key]].shape[0]):
                    raise DataError(
                        f"task {task} of the manifest names image {max(numbers)} of class {key[:80]!r}, which has {there}; "
                        "freeze the tasks again"
                    )
            self._tasks.append(([number_of[key] for key in keys], images))
        super().__init__(
            dataset,
            manifest.split,
            way=manifest.way,
            shot=manifest.shot,
            query=manifest.query,
            seed=manifest.seed,
            dtype=dtype,
        )

    def draw(self, step: int, task: int) -> tuple[list[int], list[list[int]]]:
        """Class ids and image numbers of a task.

        Raises:
            InputError: the manifest has no such task.
        """
        if step != 0 or not 0 <= task < len(self._tasks):
            raise InputError(
                f"task {task} of step {step} is not in the manifest; it has tasks 0 to {len(self._tasks) - 1} of step 0"
            )
        return self._tasks[task]


def freeze(source: EpisodeSource, tasks: int) -> bytes:
    """The manifest of tasks 0 .. `tasks` - 1 of step 0; the same bytes at every call.

    Args:
        source: of the tasks; its augmentation is not part of a manifest.
        tasks: n >= 1.

    Raises:
        ConfigError: the manifest would be larger than one may be.
    """
    lines = []
    for task in range(tasks):
        classes, images = source.draw(0, task)
        lines.append(_line({"task": task, "classes": [source.class_key(c) for c in classes], "images": images}))
    body = b"".join(lines)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": source.dataset.index.name,
        "fingerprint": source.dataset.index.fingerprint,
        "spec_version": SPEC_VERSION,
        "seed": source.seed,
        "split": source.split,
        "way": source.way,
        "shot": source.shot,
        "query": source.query,
        "tasks": tasks,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    content = _line(header) + body
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"--tasks {tasks}: the manifest would have {len(content)} bytes, {MAX_BYTES} are allowed; freeze fewer tasks"
        )
    return content


def publish(url: str, content: bytes, options: StorageOptions | None = None) -> bool:
    """Write a manifest where there is none.

    Returns:
        False if the very same manifest is there already.

    Raises:
        DataError: something else is there, and is left alone.
        InputError: the URL names no file.
        StorageError: storage fails.
    """
    place, name = _place(url, options)
    if version_of(place, name) == ABSENT:  # there are servers that do not heed the condition of a write
        with suppress(ChangedError):
            place.write(name, content, only_if=ABSENT)
            return True
    if place.stat(name).size == len(content) and place.read(name) == content:
        return False
    raise DataError(
        f"{place.url}/{name} is there already and holds something else; choose another name, or remove it first"
    )


def read_manifest(url: str, options: StorageOptions | None = None) -> Manifest:
    """Read and verify a manifest.

    Raises:
        DataError: there is none, or it is too large, of another format or version, damaged, or not regular.
        InputError: the URL names no file.
        StorageError: storage fails.
    """
    place, name = _place(url, options)
    where = f"{place.url}/{name}"
    try:
        found = place.stat(name)
        if found.size > MAX_BYTES:
            raise DataError(f"{where} is {found.size} bytes long, a manifest has at most {MAX_BYTES}; check the URL")
        content = place.read(name, version=found.version)
    except MissingError as error:
        raise DataError(
            f"there is no manifest {where}; check the URL, or write it with `imaml freeze-tasks`"
        ) from error
    try:
        return _parsed(content)
    except _RefusedError as error:
        raise DataError(f"{where} {error}; copy it again, or write it again with `imaml freeze-tasks`") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a readable manifest ({brief(error)}); copy it again, or write it again with "
            "`imaml freeze-tasks`"
        ) from error


class _RefusedError(Exception):
    """What is wrong with a manifest, as the rest of a sentence about it."""


def _parsed(content: bytes) -> Manifest:
    first, _, body = content.partition(b"\n")
    header: dict[str, Any] = json.loads(first)
    _check((header["format"], header["version"]) == (FORMAT, VERSION), f"is not a {FORMAT} file of version {VERSION}")
    _check(header["sha256"] == hashlib.sha256(body).hexdigest(), "does not match its own sha256")
    drawing = header["spec_version"]
    _check(drawing == SPEC_VERSION, f"follows version {drawing!r:.20} of the drawing rules, this is {SPEC_VERSION}")
    texts, numbers = ("dataset", "fingerprint", "split"), ("way", "shot", "query", "tasks")
    regular = all(isinstance(header[name], str) for name in texts) and header["split"] in DOMAINS
    regular &= all(_is_number(header[name]) and header[name] >= 1 for name in numbers)
    _check(regular and _is_number(header["seed"]) and header["seed"] < 1 << 64, "has a header that makes no sense")
    way, per_class = header["way"], header["shot"] + header["query"]
    lines = body.splitlines()
    _check(len(lines) == header["tasks"], f"has {len(lines)} tasks, its header says {header['tasks']}")
    tasks = []
    for number, line in enumerate(lines):
        task = json.loads(line)
        classes, images = task["classes"], task["images"]
        whole = task["task"] == number and len(classes) == len(images) == len(set(classes)) == way
        whole &= all(isinstance(key, str) for key in classes)
        whole &= all(len(i) == len(set(i)) == per_class and all(_is_number(n) for n in i) for i in images)
        _check(whole, f"has a task {number} that is not {way} classes of {per_class} different images")
        tasks.append((classes, images))
    facts = {name: header[name] for name in ("dataset", "fingerprint", "seed", "split", "way", "shot", "query")}
    return Manifest(**facts, tasks=tuple(tasks), sha256=hashlib.sha256(content).hexdigest())


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _RefusedError(otherwise)


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _place(url: str, options: StorageOptions | None) -> tuple[Storage, str]:
    """The storage that a file lies in, and its name there."""
    folder, _, name = url.rpartition("/")
    in_bucket = url.startswith(S3)
    signed = in_bucket and set("?#") & set(url)  # behind which there may be a signature
    if not name or url == S3 + name or signed:
        raise InputError(
            f"{re.split('[?#]', without_secrets(url))[0]!r} names no file; give a path, a file:// URL or s3://bucket/name, such as "
            "tasks.jsonl"
        )
    place = open_storage(folder if in_bucket else url, options)
    return (Folder(place.path.parent), place.path.name) if isinstance(place, Folder) else (place, name)
