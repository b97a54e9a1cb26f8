"""Warm start: a run begins with the model of another run, or of a safetensors file, in place of a random one.

Only the model is taken over: the optimiser, the ledger and what the algorithm itself learns begin afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from imaml_dist.errors import CheckpointError, ConfigError, StorageError
from imaml_dist.storage.local import local_path
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import MODEL
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of


def load_into(model: nn.Module, path: str, skip: Sequence[str] = ()) -> str:
    """Overwrite the state of a model, all of it but what is skipped; nothing is changed if anything does not fit.

    Shapes must be equal. Numbers of one floating type are converted to the model's own floating type, which may round;
    every other type must be equal.

    Args:
        model: at its initial values.
        path: a run directory (its best checkpoint), a checkpoint folder, or a `.safetensors` file with the names of
            `model.state_dict()`; a path or `file://` URL.
        skip: names, or leading dotted parts of names, of tensors that keep their initial values.

    Returns:
        sha256 in hex of all the source's model tensors as they were read, skipped ones included: `params_sha256` of
        the run they come from, if it was taken at its end.

    Raises:
        ConfigError: nothing that can be read lies at `path`, or `skip` names nothing or everything.
        CheckpointError: it is damaged, or its tensors are not those of the model.
        StorageError: it is there and cannot be read.
    """
    where = local_path(path)
    source, own = _read(where), model.state_dict()
    for prefix in skip:
        if not any(_under(name, [prefix]) for name in (*own, *source)):
            raise ConfigError(
                f"warm_start.skip: {prefix!r} names no tensor; the model's are {', '.join(list(own)[:6])}"
                + (", ..." if len(own) > 6 else "")
            )
    wanted = {name: value for name, value in own.items() if not _under(name, skip)}
    if not wanted:
        raise ConfigError(
            f"warm_start.skip: {list(skip)!r} names all of the model, so nothing would be read from {where}"
        )
    for name in source:
        if name not in own and not _under(name, skip):
            _refuse(where, f"holds {name!r}, which this model does not have")
    fitting = {name: _fitting(where, name, source.get(name), value) for name, value in wanted.items()}
    model.load_state_dict(own | fitting)
    return sha256_of({MODEL + name: value for name, value in source.items()})


def check_outside(path: str, run: Path) -> None:
    """Refuse to begin a run with what lies in its own directory.

    Raises:
        ConfigError: it does; `--fresh` would delete it first.
    """
    if local_path(path).resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"warm_start.path: {path} lies in the run's own directory {run}; choose another --run-dir")


def _read(where: Path) -> dict[str, Tensor]:
    """The model tensors of a source under the names of the model."""
    if not where.exists():
        raise ConfigError(
            f"warm_start.path: there is no {where}; give a run directory, a checkpoint folder or a .safetensors file"
        )
    if not where.is_dir():
        return _read_file(where)
    if (where / checkpoints.MANIFEST).is_file():
        folder = where
    elif (where / "config.yaml").is_file():
        run = RunDirectory(where)
        folder = checkpoints.path_of(run.checkpoints, run.best_checkpoint())
    else:
        raise ConfigError(
            f"warm_start.path: {where} is neither a run directory (no config.yaml) nor a checkpoint (no {checkpoints.MANIFEST})"
        )
    tensors, _ = checkpoints.load(folder.resolve())
    return {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}


def _read_file(where: Path) -> dict[str, Tensor]:
    if where.suffix != ".safetensors":
        raise ConfigError(
            f"warm_start.path: {where} is not a .safetensors file, and nothing else is read; save the model's state_dict() with "
            "safetensors.torch.save_file"
        )
    try:
        return checkpoints.parse_tensors(where.read_bytes())
    except OSError as error:
        raise StorageError(f"{where} cannot be read ({error}); mend that and run the same command again") from error
    except ValueError as error:
        raise CheckpointError(f"warm_start.path: {where} is {error}") from error


def _fitting(where: Path, name: str, found: Tensor | None, own: Tensor) -> Tensor:
    """The tensor that takes the place of the model's `own`, in the model's type."""
    if found is None:
        _refuse(where, f"has no {name!r}, which this model needs")
    if found.shape != own.shape:
        _refuse(where, f"has {name!r} in shape {tuple(found.shape)}, this model in {tuple(own.shape)}")
    if found.dtype != own.dtype and not (found.is_floating_point() and own.is_floating_point()):
        _refuse(where, f"has {name!r} in type {found.dtype}, this model in {own.dtype}")
    converted = found.to(own.dtype)
    if own.is_floating_point() and not bool(converted.isfinite().all()):
        _refuse(where, f"has numbers in {name!r} that are not finite in {own.dtype}")
    return converted


def _refuse(where: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"warm_start.path: {where} {what}; give a source of the same model, or name the layer in warm_start.skip"
    )


def _under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted name is one of the prefixes, or lies below one: `head` has `head.weight` and not `header`."""
    return any(f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)
