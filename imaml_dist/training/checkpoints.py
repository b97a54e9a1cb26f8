"""Checkpoints: safetensors and JSON, verified byte for byte before use, never a pickle.

    RUN/checkpoints/step-00000050/state.safetensors   tensors of the meta-state
                                  state.json          the rest of it
                                  manifest.json       sha256 and size of both; written last

A checkpoint is written under a temporary name and renamed when everything in it is on disk, so a folder without a
valid manifest is never one that was finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from imaml_dist.errors import CheckpointError, StorageError
from imaml_dist.storage.local import atomic_write, sync_folder

FORMAT, VERSION = "imaml-checkpoint", 1
TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"

_NAME = re.compile(r"step-(\d{8})\Z")


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` committed meta-steps; an existing one that verifies is left as it is.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    from safetensors.torch import save as serialise

    final = path_of(folder, step)
    if final.is_dir():
        try:
            _verified(final)
            return final
        except CheckpointError:
            shutil.rmtree(final)
    part = folder / f".{final.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    contents = {TENSORS: serialise(tensors), FACTS: json.dumps(facts, sort_keys=True).encode()}
    for name, data in contents.items():
        atomic_write(part / name, data)
    atomic_write(part / MANIFEST, json.dumps(_manifest(step, contents), indent=1, sort_keys=True).encode())
    os.replace(part, final)
    sync_folder(folder)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify and read one checkpoint.

    Raises:
        CheckpointError: it is incomplete, damaged or of another format; the message names the file.
        StorageError: it is there and cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    contents = _verified(path)
    try:
        tensors, facts = parse(contents[TENSORS]), json.loads(contents[FACTS])
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} verifies but cannot be read: {error}") from error
    if path != path_of(path.parent, step_of(facts)):
        raise CheckpointError(f"{path} holds the state of step {step_of(facts)}")
    return tensors, facts


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
    reasons = []
    for step in reversed(steps(folder)):
        try:
            return load(path_of(folder, step))
        except CheckpointError as error:
            reasons.append(str(error))
            if rejected is not None:
                rejected(str(error))
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} verifies ({reasons[0]}); start over with --fresh")
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
        return int(facts["ledger"]["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{FACTS} of a checkpoint has no ledger ({type(error).__name__}: {error})") from error


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`, so that they count no more and can still be looked at."""
    for later in steps(folder):
        if later > step:
            aside = folder / f"rejected-{later:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path_of(folder, later), aside)


def prune(folder: Path, keep: int, best: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one of step `best`, and leftovers of interrupted writes."""
    for step in steps(folder)[:-keep]:
        if step != best:
            shutil.rmtree(path_of(folder, step))
    for leftover in folder.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def _manifest(step: int, contents: dict[str, bytes]) -> dict[str, Any]:
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    return {"format": FORMAT, "version": VERSION, "step": step, "files": files}


def _verified(path: Path) -> dict[str, bytes]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path} has format {manifest['format']!r} version {manifest['version']!r}, this is {FORMAT!r} version {VERSION}"
            )
        contents = {}
        for name in (TENSORS, FACTS):
            data = (path / name).read_bytes()
            expected = manifest["files"][name]
            if len(data) != expected["size"]:
                raise CheckpointError(f"{path / name} is {len(data)} bytes long, its manifest says {expected['size']}")
            if (found := hashlib.sha256(data).hexdigest()) != expected["sha256"]:
                raise CheckpointError(
                    f"{path / name} has sha256 {found[:12]}, its manifest says {expected['sha256'][:12]}"
                )
            contents[name] = data
        if manifest != _manifest(int(path.name.removeprefix("step-")), contents):
            raise CheckpointError(f"{path / MANIFEST} does not describe the checkpoint it lies in")
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint ({type(error).__name__}: {error})") from error
    except OSError as error:  # not damaged, only not to be had now: nothing older may be taken in its place
        raise StorageError(f"{path} cannot be read ({error}); mend that and run the same command again") from error
    return contents
