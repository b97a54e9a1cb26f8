"""Our CPU kernels as the programs use them: compiled with a word to the person who waits."""

from __future__ import annotations

from imaml_dist.errors import KernelError
from imaml_dist.kernels import native
from pipelines import console


def usable() -> bool:
    """Whether they can be used on this machine; says so when they are compiled now, or why not."""
    try:
        if not native.is_compiled():
            console.out.print("compiling the CPU kernels, once on this machine: about twenty seconds", soft_wrap=True)
        native.load()
    except KernelError as error:
        console.err.print(f"torch's own kernels are used, which are slower here: {error}", soft_wrap=True)
        return False
    return True
