"""Every error that a user of imaml_dist can meet, and the exit code that goes with it.

A message says where, what was given, what is allowed and what to do. Each class takes that one sentence as its
only argument, so that every error survives pickling on its way back from a worker process.
"""

from textwrap import shorten


class ImamlError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(ImamlError):
    """What the user gave cannot be used: configuration, paths, data, arguments."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration field is misspelt, missing, of the wrong type or out of its range."""


class DataError(InputError):
    """A data set is missing, incomplete or does not match its index."""


class MissingError(InputError):
    """Nothing has that name in storage."""


class MissingBucketError(MissingError):
    """The bucket itself does not exist, let alone what is in it."""


class ModelError(InputError):
    """A model cannot be meta-trained as it is; the message names the layer."""


class LossError(InputError):
    """A loss cannot be meta-trained with."""


class CheckpointError(InputError):
    """A checkpoint does not verify, or belongs to another configuration."""


class OutsideError(ImamlError):
    """Something outside of the program fails: cluster, storage, tracking server."""

    exit_code = 3


class StorageError(OutsideError):
    """Reading or writing storage failed."""


class ChangedError(StorageError):
    """An object of storage is another one than before, or than a writer took it for."""


class LeaseLostError(OutsideError):
    """Another process has taken over what this one was writing."""


class TrackingError(OutsideError):
    """The tracking server cannot be reached or refuses."""


class KernelError(OutsideError):
    """Kernels of our own cannot be compiled or loaded on this machine."""


class DisagreementError(OutsideError):
    """Workers that ought to hold the same state do not.

    Attributes:
        faulty: whether the worker that raises it is the one at fault.
    """

    def __init__(self, message: str, faulty: bool = False) -> None:
        super().__init__(message)
        self.faulty = faulty


class NoRoomError(OutsideError):
    """This machine has not enough memory for what is to be computed."""


class ClusterError(OutsideError):
    """Ray cannot be started or reached, or does not offer what a run needs."""


class PeerLostError(OutsideError):
    """Another worker has died, is silent, or does not take part any more; the others can go on without it."""


class TrainingError(ImamlError):
    """Training gave up; the message has the reason and the last good checkpoint."""

    exit_code = 4


def brief(error: BaseException) -> str:
    """Another library's error, to be quoted within a sentence: one line, not too long."""
    return f"{type(error).__name__}: {shorten(str(error), 200, placeholder=' ...')}"
