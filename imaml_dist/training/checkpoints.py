"""Checkpoints: safetensors and JSON, verified byte for byte before use, never a pickle.

    RUN/checkpoints/step-00000050/state.safetensors   tensors of the meta-state
                                  state.json          the rest of it
                                  manifest.json       sha256 and size of both; written last

A checkpoint is written under a temporary name and renamed when everything in it is on disk, so a folder without a
valid manifest is never one that was finished. What is read may have been damaged or made by anyone: nothing in it is executed,
links are not followed, no file is read whose length is not the expected one, and a manifest counts only if it is, byte for byte,
the one that would be written for the files beside it. Other files in the folder are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from imaml_dist.errors import CheckpointError, StorageError, brief
from imaml_dist.storage.local import atomic_write, sync_folder

FORMAT, VERSION = "imaml-checkpoint", 1
TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"

MANIFEST_BYTES = 1 << 16
"""No manifest is longer; what is, is not read."""

_NAME = re.compile(r"step-([0-9]{8})\Z")


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` committed meta-steps; an existing one that verifies is left as it is.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    from safetensors.torch import save as serialise

    final = path_of(folder, step)
    if os.path.lexists(final):
        try:
            _verified(final)
            return final
        except CheckpointError:
            _delete(final)
    part = folder / f".{final.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    contents = {TENSORS: serialise(tensors), FACTS: json.dumps(facts, sort_keys=True).encode()}
    for name, data in contents.items():
        atomic_write(part / name, data)
    atomic_write(part / MANIFEST, _manifest(step, contents))
    os.replace(part, final)
    sync_folder(folder)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify and read one checkpoint.

    Raises:
        CheckpointError: it is incomplete, damaged or of another format; the message names the file.
        StorageError: it is there and cannot be read, or memory has no room for it.
    """
    contents = _verified(path)
    try:
        tensors, facts = parse_tensors(contents[TENSORS]), json.loads(contents[FACTS])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} verifies but cannot be read: {brief(error)}") from error
    step = step_of(facts)
    if path != path_of(path.parent, step):
        raise CheckpointError(f"{path} holds the state of step {step!r:.40}")
    return tensors, facts


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """Named tensors from the bytes of a safetensors file, whoever wrote it.

    Raises:
        ValueError: it is none, or has types or shapes that torch does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        tensors: dict[str, Tensor] = parse(data)
        return tensors
    except (SafetensorError, KeyError, TypeError, RuntimeError, AssertionError, OverflowError) as error:
        raise ValueError(f"not a whole safetensors file ({brief(error)})") from error


def steps(folder: Path) -> list[int]:
    """Steps with a finished checkpoint, oldest first; not verified."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for entry in folder.iterdir() if (m := _NAME.match(entry.name)))


def load_newest(
    folder: Path, rejected: Callable[[str], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that verifies, or None if there is none at all.

    Args:
        folder: of the checkpoints.
        rejected: told about every checkpoint passed over, in one sentence.

    Raises:
        CheckpointError: there are checkpoints and none of them verifies.
    """
    return newest_that_verifies(steps(folder), lambda step: load(path_of(folder, step)), str(folder), rejected)


def newest_that_verifies(
    steps: Sequence[int],
    load: Callable[[int], tuple[dict[str, Tensor], dict[str, Any]]],
    where: str,
    rejected: Callable[[str], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """As `load_newest`, wherever checkpoints come from."""
    reasons = []
    for step in reversed(steps):
        try:
            return load(step)
        except CheckpointError as error:
            reasons.append(str(error))
            if rejected is not None:
                rejected(str(error))
    if reasons:
        raise CheckpointError(f"no checkpoint in {where} verifies ({reasons[0]}); start over with --fresh")
    return None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, whether it exists or not."""
    return folder / f"step-{step:08d}"


def step_of(facts: Any) -> int:
    """The number of committed meta-steps that the facts of a checkpoint tell.

    Raises:
        CheckpointError: they tell none.
    """
    try:
        found = facts["ledger"]["steps"]
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{FACTS} of a checkpoint has no ledger ({brief(error)})") from error
    if type(found) is not int:
        raise CheckpointError(f"{FACTS} of a checkpoint counts {found!r:.40} meta-steps, which is no whole number")
    return found


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`, so that they count no more and can still be looked at."""
    for later in steps(folder):
        if later > step:
            aside = folder / f"rejected-{later:08d}"
            if os.path.lexists(aside):
                _delete(aside)
            os.replace(path_of(folder, later), aside)


def prune(folder: Path, keep: int, best: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one of step `best`, and leftovers of interrupted writes."""
    kept = to_keep(steps(folder), keep, best)
    for step in steps(folder):
        if step not in kept:
            _delete(path_of(folder, step))
    for leftover in folder.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def to_keep(steps: Sequence[int], keep: int, best: int) -> set[int]:
    """Of these steps, oldest first, those that `prune` leaves."""
    return {*steps[-keep:], *([best] if best in steps else [])}


def _manifest(step: int, contents: dict[str, bytes]) -> bytes:
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _verified(path: Path) -> dict[str, bytes]:
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a complete checkpoint (it is not a folder)")
        manifest = _read(path / MANIFEST)
        said = json.loads(manifest)
        if (said["format"], said["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path} has format {said['format']!r:.40} version {said['version']!r:.40}, this is {FORMAT!r} version {VERSION}"
            )
        contents = {}
        for name in (TENSORS, FACTS):
            expected = said["files"][name]
            data = contents[name] = _read(path / name, expected["size"])
            if (found := hashlib.sha256(data).hexdigest()) != expected["sha256"]:
                raise CheckpointError(
                    f"{path / name} has sha256 {found[:12]}, its manifest says {expected['sha256'][:12]!r:.40}"
                )
        if manifest != _manifest(int(path.name.removeprefix("step-")), contents):
            raise CheckpointError(f"{path / MANIFEST} does not describe the checkpoint it lies in")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({brief(error)})") from error
    except (OSError, MemoryError) as error:  # not damaged, only not to be had now: nothing older may take its place
        raise StorageError(
            f"{path} cannot be read ({brief(error)}); mend that and run the same command again"
        ) from error
    return contents


def _read(file: Path, size: Any = None) -> bytes:
    """The bytes of a plain file of that size; None for what may be any size of a manifest."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file} is a link, a folder or a device, not a file of the checkpoint's own")
    if size is None and found.st_size > MANIFEST_BYTES:
        raise CheckpointError(f"{file} is {found.st_size} bytes long, no manifest has more than {MANIFEST_BYTES}")
    if size is not None and found.st_size != size:
        raise CheckpointError(f"{file} is {found.st_size} bytes long, its manifest says {size!r:.40}")
    with file.open("rb") as stream:
        return stream.read(found.st_size)


def _delete(path: Path) -> None:
    """Whatever lies there; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
