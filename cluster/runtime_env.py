"""What travels with a submitted job: a working directory, importable folders, and of the environment only what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from imaml_dist.errors import InputError

ALLOWED = (
    r"AWS_(REGION|DEFAULT_REGION|ENDPOINT_URL|ENDPOINT_URL_S3|CA_BUNDLE|EC2_METADATA_DISABLED)",
    r"MLFLOW_(TRACKING_URI|EXPERIMENT_NAME|HTTP_REQUEST_TIMEOUT|HTTP_REQUEST_MAX_RETRIES|S3_ENDPOINT_URL)",
    r"IMAML_(CACHE|KERNELS)",
    r"RAY_(TRAIN|health_check)_[A-Za-z_]+",
    r"(GLOO|NCCL)_SOCKET_IFNAME",
    r"NCCL_(DEBUG|IB_DISABLE|P2P_DISABLE|NET_GDR_LEVEL)",
    r"RAY_USAGE_STATS_ENABLED",
)
"""Names of variables that may travel. Everything else stays: a list of what is secret would always lack one."""

EXCLUDES = (
    ".?*", "venv/", "__pycache__/", "/runs/", "/data/", "build/", "dist/", "*.egg-info/", "*.pem", "*.key", "mlflow.db",
)  # fmt: skip
"""Of a working directory, in the language of .gitignore: whatever is hidden, and what is large, made anew, or secret."""

_ALLOWED = re.compile("|".join(f"(?:{pattern})" for pattern in ALLOWED))
_CREDENTIALS_IN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+@", re.IGNORECASE)


def may_travel(name: str) -> bool:
    """Whether an environment variable may stand in a manifest or in a job's description."""
    return _ALLOWED.fullmatch(name) is not None


def check_variable(name: str, value: str, where: str) -> None:
    """Refuse what must not be written down.

    Raises:
        InputError: the variable is not one of those that may travel, or its value is a URL with credentials.
    """
    if not may_travel(name):
        raise InputError(
            f"{where}: {name} is not among the variables that may be written down; if it is a secret, keep it in a Secret of the cluster "
            "and name that under `secrets`"
        )
    if _CREDENTIALS_IN_URL.search(value):
        raise InputError(f"{where}: {name} is a URL with credentials in it; take them out, and keep them in a Secret")


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, the variables that go with a job.

    Raises:
        InputError: one of them is a URL with credentials.
    """
    chosen = {name: value for name, value in sorted(environment.items()) if may_travel(name)}
    for name, value in chosen.items():
        check_variable(name, value, "environment")
    return chosen


def runtime_env(
    working_dir: Path, environment: Mapping[str, str], modules: Sequence[Path] = (), excludes: Sequence[str] = ()
) -> dict[str, Any]:
    """Ray's description of what a job needs.

    Args:
        working_dir: becomes the current folder of the job and of all its workers.
        environment: of the submitting process; only what may travel is taken.
        modules: folders of packages (with their `__init__.py`) that lie elsewhere.
        excludes: more patterns that stay behind, in the language of .gitignore.

    Raises:
        InputError: a folder is missing, or a variable has credentials in it.
    """
    for folder in (working_dir, *modules):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder, so it cannot go with the job; name one that exists")
    for folder in modules:
        if not (folder / "__init__.py").is_file():
            raise InputError(f"{folder} has no __init__.py, so it is no package; name the folder of a package")
    described: dict[str, Any] = {
        "working_dir": str(working_dir.resolve()),
        "excludes": [*EXCLUDES, *excludes],
        "env_vars": travelling(environment),
    }
    if modules:
        described["py_modules"] = [str(folder.resolve()) for folder in modules]
    return described


@contextmanager
def staged(folder: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """A folder that holds what another one holds, and more files, as long as the context lasts.

    Args:
        folder: exists; nothing is written there.
        files: name -> text; a file of that name in the folder is hidden by it.
    """
    with TemporaryDirectory() as made:
        for entry in folder.resolve().iterdir():
            if entry.name not in files:
                (Path(made) / entry.name).symlink_to(entry)
        for name, text in files.items():
            (Path(made) / name).write_text(text, encoding="utf-8")
        yield Path(made)
