"""Files and checkpoints of a run between the folder of a process and the run's objects in storage.

A checkpoint without its manifest, which is written last and removed first, is none. What comes from storage may have been damaged or
made by anyone: it is verified where it arrives, as in a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from imaml_dist.errors import ChangedError, CheckpointError, InputError, MissingError
from imaml_dist.storage.local import atomic_write
from imaml_dist.storage.protocol import Storage
from imaml_dist.training import checkpoints

_MANIFEST = re.compile(rf"checkpoints/step-([0-9]{{8}})/{re.escape(checkpoints.MANIFEST)}\Z")

_ANY = re.compile(r"checkpoints/step-([0-9]{8})/")

_SMALL = 1 << 26
"""Bytes of a file that is brought whole: no report is larger."""


class RunObjects:
    """The objects of a run, and the folder of this process.

    Args:
        storage: of the run.
        folder: exists.
    """

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self._pushed: dict[str, bytes] = {}
        """sha256 of what is there."""

    def push(self, *files: Path) -> None:
        """Copy files of the folder; those that are not there, or are known to be there already, are left out."""
        for file in files:
            with suppress(FileNotFoundError):
                name, content = file.relative_to(self.folder).as_posix(), file.read_bytes()
                digest = hashlib.sha256(content).digest()
                if self._pushed.get(name) != digest:
                    self.storage.write(name, content)
                    self._pushed[name] = digest

    def pull(self, *files: Path) -> None:
        """Make files of the folder what the objects are; those that are not there are removed."""
        for file in files:
            name = file.relative_to(self.folder).as_posix()
            content = self._current(name)
            if content is None:
                file.unlink(missing_ok=True)
                continue
            file.parent.mkdir(exist_ok=True)
            if not file.is_file() or file.read_bytes() != content:
                atomic_write(file, content)

    def _current(self, name: str) -> bytes | None:
        """An object whole, also if it is replaced meanwhile; None if there is none."""
        while True:
            try:
                found = self.storage.stat(name)
                if found.size > _SMALL:
                    raise InputError(
                        f"{self.storage.url}/{name} is {found.size} bytes long, a run's own file has at most {_SMALL}; remove it"
                    )
                return self.storage.read(name, version=found.version)
            except MissingError:
                return None
            except ChangedError:
                continue

    def has_pushed(self, file: Path) -> bool:
        """Whether this process has."""
        return file.relative_to(self.folder).as_posix() in self._pushed

    def remove(self, *files: Path) -> None:
        """Remove objects."""
        for file in files:
            name = file.relative_to(self.folder).as_posix()
            self.storage.remove(name)
            self._pushed.pop(name, None)

    def has(self, file: Path) -> bool:
        """Whether there is such an object."""
        try:
            self.storage.stat(file.relative_to(self.folder).as_posix())
        except MissingError:
            return False
        return True

    def entries(self) -> set[str]:
        """Names of files and folders at the top of the run."""
        tops = {name.partition("/")[0] for name, _ in self.storage.names()}
        return tops - {""}  # some tools mark a prefix by an empty object of its name

    def clear(self, entries: Iterable[str], last: str) -> None:
        """Remove everything that has one of these names, or lies below one; manifests first, and one name last."""
        tops = set(entries)
        names = [name for name, _ in self.storage.names() if name.partition("/")[0] in tops]
        for name in sorted(names, key=lambda name: (name == last, not name.endswith(checkpoints.MANIFEST))):
            self.storage.remove(name)
        self._pushed.clear()

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first; not verified."""
        return sorted(int(m[1]) for name, _ in self.storage.names("checkpoints/") if (m := _MANIFEST.match(name)))

    def bring(self, step: int) -> None:
        """Bring a checkpoint into the folder, where one of this step is replaced; it is not verified yet.

        Raises:
            CheckpointError: it is not complete, or its files are not as long as its manifest says.
        """
        final = checkpoints.path_of(self.folder / "checkpoints", step)
        part = final.with_name(f".{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            manifest = self._read(step, checkpoints.MANIFEST, checkpoints.MANIFEST_BYTES)
            files = json.loads(manifest)["files"]
            for name in (checkpoints.TENSORS, checkpoints.FACTS):
                self._read_into(part / name, step, files[name]["size"])
        except (MissingError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self._url(step)} is not a complete checkpoint ({error})") from error
        (part / checkpoints.MANIFEST).write_bytes(manifest)
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)

    def send(self, step: int) -> None:
        """Copy a checkpoint of the folder; one that is there already, and is the same, is left as it is."""
        folder = checkpoints.path_of(self.folder / "checkpoints", step)
        manifest = (folder / checkpoints.MANIFEST).read_bytes()
        with suppress(MissingError, CheckpointError):
            if self._read(step, checkpoints.MANIFEST, len(manifest)) == manifest:
                return
        self.drop(step)
        for name in (checkpoints.TENSORS, checkpoints.FACTS):
            self.storage.write(self._name(step, name), folder / name)
        self.storage.write(self._name(step, checkpoints.MANIFEST), manifest)

    def drop(self, step: int) -> None:
        """Remove a checkpoint, or what is left of one."""
        for name in (checkpoints.MANIFEST, checkpoints.TENSORS, checkpoints.FACTS):
            self.storage.remove(self._name(step, name))

    def prune(self, keep: Callable[[list[int]], set[int]]) -> None:
        """Remove all checkpoints but those that `keep` chooses of the finished ones, and what is left of others."""
        names = [name for name, _ in self.storage.names("checkpoints/")]
        kept = keep(sorted(int(m[1]) for name in names if (m := _MANIFEST.match(name))))
        for step in {int(m[1]) for name in names if (m := _ANY.match(name))} - kept:
            self.drop(step)

    def _name(self, step: int, name: str) -> str:
        return f"checkpoints/step-{step:08d}/{name}"

    def _url(self, step: int) -> str:
        return f"{self.storage.url}/checkpoints/step-{step:08d}"

    def _read(self, step: int, name: str, most: int) -> bytes:
        found = self.storage.stat(self._name(step, name))
        if found.size > most:
            raise CheckpointError(f"{self._url(step)}/{name} is {found.size} bytes long, {most} are expected")
        return self.storage.read(self._name(step, name), version=found.version)

    def _read_into(self, file: Path, step: int, size: object) -> None:
        found = self.storage.stat(self._name(step, file.name))
        if found.size != size:
            raise CheckpointError(
                f"{self._url(step)}/{file.name} is {found.size} bytes long, its manifest says {size!r:.40}"
            )
        with open(file, "wb") as stream:
            for piece in self.storage.stream(self._name(step, file.name), version=found.version):
                stream.write(piece)
