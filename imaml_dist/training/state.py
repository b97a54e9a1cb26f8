"""The meta-state: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imaml_dist.errors import CheckpointError
from imaml_dist.training.ledger import Ledger


@dataclass
class Best:
    """The best validation so far; step -1 while there is none."""

    step: int = -1
    accuracy: float = -1.0


@dataclass
class MetaState:
    """Meta-parameters, optimiser, ledger, best validation, seconds in the loop, and steps skipped just now in a row."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ledger: Ledger = field(default_factory=Ledger)
    best: Best = field(default_factory=Best)
    seconds: float = 0.0
    skipped_in_a_row: int = 0

    @property
    def step(self) -> int:
        """The next meta-step to do."""
        return self.ledger.steps

    def tensors(self) -> dict[str, Tensor]:
        """`model.<name>` and `optimizer.<parameter number>.<name>`: copies on the CPU, tied weights under both names."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": value for name, value in slots.items() if isinstance(value, Tensor)}
        return {name: value.detach().to("cpu").contiguous().clone() for name, value in named.items()}

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, in JSON."""
        return {
            "ledger": self.ledger.to_dict(),
            "best": asdict(self.best),
            "seconds": self.seconds,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            CheckpointError: names or shapes differ from this model's.
        """
        load_model(self.model, tensors)
        try:
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, number, slot = name.split(".", 2)
                    slots.setdefault(int(number), {})[slot] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
            self.ledger, self.best = Ledger(**facts["ledger"]), Best(**facts["best"])
            self.seconds, self.skipped_in_a_row = float(facts["seconds"]), int(facts["skipped_in_a_row"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint is of another version ({type(error).__name__}: {error}); start over with --fresh"
            ) from error


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the model's part of a saved state.

    Raises:
        CheckpointError: names, shapes or types differ from this model's.
    """
    saved = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in saved.items()}
    if expected != found:
        odd = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        said = {True: "has shape {} of {}", False: "does not exist{}{}"}
        there, here = (said[odd in known].format(*known.get(odd, ("", ""))) for known in (found, expected))
        raise CheckpointError(f"the checkpoint's {odd!r} {there}, this model's {here}; it belongs to another model")
    model.load_state_dict(saved)


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """sha256 in hex over names, types, shapes and bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
