"""How a command ends: errors in one sentence, and the exit code of their kind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from imaml_dist.errors import ImamlError, InputError, StorageError
from pipelines import console

INTERRUPTED = 130

_debug = False
_leave_at_once = False
"""Ctrl-C was pressed, and nothing is left to be put in order."""


def show_tracebacks(debug: bool) -> None:
    """Whether errors made on purpose keep their traceback."""
    global _debug
    _debug = debug


@contextmanager
def exit_codes(*, orderly: bool = False) -> Iterator[None]:
    """Errors made on purpose become one sentence and their exit code; others are bugs and keep their traceback.

    Args:
        orderly: this process has others to end, so even Ctrl-C lets it come to its own end.
    """
    global _leave_at_once
    try:
        yield
    except ImamlError as error:
        if _debug:
            raise
        console.err.print(f"imaml: {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a path that is not what it should be, or a disk that is full or read-only
        if _debug:
            raise
        console.err.print(f"imaml: {error.filename or 'input/output'}: {error.strerror or error}", soft_wrap=True)
        users_own = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        raise typer.Exit(InputError.exit_code if isinstance(error, users_own) else StorageError.exit_code) from None
    except KeyboardInterrupt:
        console.err.print("imaml: interrupted")
        _leave_at_once = not orderly
        raise typer.Exit(INTERRUPTED) from None


def leave_if_interrupted() -> None:
    """End the process where Ctrl-C ended a command: Python would wait for threads that still fetch, as long as storage has patience."""
    if _leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
