"""How a command ends: what an error becomes for the user, and which code the shell gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from imaml_dist.errors import ImamlError, InputError, StorageError
from pipelines import console

INTERRUPTED = 130


@dataclass
class State:
    """Of the command that runs.

    Attributes:
        debug: show tracebacks.
        leave_at_once: Ctrl-C was pressed, and nothing is left to be put in order.
    """

    debug: bool = False
    leave_at_once: bool = False


state = State()


@contextmanager
def exit_codes(*, orderly: bool = False) -> Iterator[None]:
    """Errors made on purpose become one sentence and their exit code; others are bugs and keep their traceback.

    Args:
        orderly: this process has others to end, so even Ctrl-C lets it come to its own end.
    """
    try:
        yield
    except ImamlError as error:
        if state.debug:
            raise
        console.err.print(f"imaml: {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a path that is not what it should be, or a disk that is full or read-only
        if state.debug:
            raise
        console.err.print(f"imaml: {error.filename or 'input/output'}: {error.strerror or error}", soft_wrap=True)
        users_own = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        raise typer.Exit(InputError.exit_code if isinstance(error, users_own) else StorageError.exit_code) from None
    except KeyboardInterrupt:
        console.err.print("imaml: interrupted")
        state.leave_at_once = not orderly
        raise typer.Exit(INTERRUPTED) from None
