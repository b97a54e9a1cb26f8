"""Convolution and batch normalisation for CPUs: compiled from `native.cpp` and its headers at first use, kept, and loaded into torch.

What torch lacks there: one call for T tasks with weights of their own (under `vmap` they become grouped convolutions, which
CPUs run slowly), and a second derivative of batch normalisation in two passes over the data (torch composes it of a dozen).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from imaml_dist.errors import KernelError, brief

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-std=c++20", "-fPIC", "-shared")

PASSING = ("Killed", "Terminated", "out of memory", "Cannot allocate memory", "No space left")
"""What compilers say when they were stopped, or lacked memory or space: that may be over when the next process asks."""

FOLDER = "IMAML_KERNELS"
"""Environment variable: where compiled kernels are kept; `~/.cache/imaml_dist/kernels` without it."""


def is_compiled() -> bool:
    """Whether `load` will find the kernels compiled, or need some twenty seconds.

    Raises:
        KernelError: there is no compiler, or it failed before.
    """
    library = _library(_compiler())
    if library.exists():
        return True
    _refuse_what_failed(library)
    return False


def usable() -> bool:
    """Whether the kernels are loaded, or could be now."""
    try:
        load()
    except KernelError:
        return False
    return True


@cache
def load() -> None:
    """Make `conv2d` and `batch_norm` usable in this process; compiles them if that was not done on this machine before.

    A failure is remembered beside where the result would be, until that marker is deleted: the same compiler would say the same
    about the same source, and take its time for it.

    Raises:
        KernelError: there is no C++ compiler, it fails, or the folder for its result cannot be used.
    """
    compiler = _compiler()
    library = _library(compiler)
    if library.exists():
        try:
            return torch.ops.load_library(str(library))  # type: ignore[no-untyped-call, no-any-return]
        except OSError:  # damaged; compiled again below
            pass
    _refuse_what_failed(library)
    _compile(compiler, library)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        sentence = f"the compiled kernels cannot be loaded ({brief(error)}); use run.execution: vmap"
        raise _failure(library, sentence) from error


def conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """As `torch.conv2d` with square stride and padding, on `[n, c, h, w]`, or `[T, n, c, h, w]` with `[T, o, c, kh, kw]` and `[T, o]`.

    Differentiable any number of times; float32 or float64 on the CPU. Every task's result has the bits it has alone.
    """
    found: Tensor = torch.ops.imaml.conv2d(x, kernel, bias, stride, padding)
    return found


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, activation: str = "identity", sharpness: float = 1.0
) -> Tensor:
    """Batch normalisation by the batch's own statistics, on `[n, c, h, w]`, or `[T, n, c, h, w]` with `[T, c]` and `[T, c]`.

    Behind it lies `relu`, `silu`, `gelu` or `softplus`, the last with beta = `sharpness`; `identity` is nothing. Differentiable
    twice; else as `conv2d`.
    """
    found: Tensor = torch.ops.imaml.batch_norm(x, gamma, beta, eps, activation, sharpness)
    return found


def flops() -> int:
    """FLOPs of all convolutions and their derivatives in this process so far; a multiplication and an addition are two."""
    found: int = torch.ops.imaml.flops()
    return found


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are made for tensors of this type and device."""
    given = [tensor for tensor in tensors if tensor is not None]
    kinds = {(tensor.device.type, tensor.dtype) for tensor in given}
    return len(kinds) == 1 and kinds <= {("cpu", torch.float32), ("cpu", torch.float64)}


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if found is None:
        raise KernelError(
            f"there is no C++ compiler{f' {named!r} (from CXX)' if named else ''} to compile the CPU kernels with; install g++, or use "
            "run.execution: vmap"
        )
    return found


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603


def _flags(compiler: str) -> tuple[str, ...]:
    """With OpenMP, without which torch's `parallel_for` is a plain loop, from GNU: others bring a runtime that is not torch's own."""
    return (*FLAGS, "-fopenmp") if "Free Software Foundation" in _version(compiler) else FLAGS


def _library(compiler: str) -> Path:
    """Its name says all that the compiled code depends on: source, torch, compiler, processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    except OSError:
        processor = []
    sources = [source.read_text(encoding="utf-8") for source in (SOURCE, *HEADERS)]
    parts = (*sources, torch.__version__, compiler, _version(compiler), *_flags(compiler), *processor)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return _folder() / f"native-{key[:16]}.so"


def _folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml_dist" / "kernels"
    folder = Path(os.environ.get(FOLDER) or default)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.stat()
    except OSError as error:
        raise KernelError(
            f"{folder} cannot keep compiled kernels ({brief(error)}); set {FOLDER} to another folder"
        ) from error
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:  # what lies there is executed
        raise KernelError(
            f"{folder} belongs to somebody else or can be written by others, so nothing is loaded from there; "
            f"set {FOLDER} to a folder of your own"
        )
    return folder


def _compile(compiler: str, library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            result = Path(scratch) / library.name
            command = [
                compiler,
                *_flags(compiler),
                f"-I{include}",
                f"-I{include / 'torch/csrc/api/include'}",
                str(SOURCE),
            ]
            command += ["-o", str(result), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
            english = {**os.environ, "LC_ALL": "C"}  # for what is looked for in its words
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=english)  # noqa: S603
            if done.returncode == 0:
                result.replace(library)  # whole or not at all; of two at once either is right
                return
    except OSError as error:
        sentence = f"the CPU kernels cannot be compiled ({brief(error)}); use run.execution: vmap"
        raise _failure(library, sentence, lasting=False) from error
    errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
    sentence = (
        f"the CPU kernels cannot be compiled ({errors[0][:200]}); use run.execution: vmap, or see what "
        f"{shlex.join(command[:1])} says to {SOURCE.name}"
    )
    raise _failure(library, sentence, lasting=done.returncode > 0 and not any(sign in done.stderr for sign in PASSING))


_failed: dict[Path, str] = {}
"""What is not tried again in this process only: what may not last, or could not be written beside the library."""


def _failure(library: Path, sentence: str, lasting: bool = True) -> KernelError:
    """The error to raise; it is remembered, for all processes if it lasts."""
    if lasting:
        marker = _marker(library)
        with suppress(OSError):
            marker.write_text(sentence, encoding="utf-8")
            return _lasting(sentence, marker)
    _failed[library] = sentence
    return KernelError(sentence)


def _refuse_what_failed(library: Path) -> None:
    if library in _failed:
        raise KernelError(_failed[library])
    marker = _marker(library)
    with suppress(OSError):
        raise _lasting(marker.read_text(encoding="utf-8"), marker)


def _marker(library: Path) -> Path:
    return library.with_suffix(".failed")


def _lasting(sentence: str, marker: Path) -> KernelError:
    return KernelError(f"{sentence}; it is tried again once {marker} is deleted")
