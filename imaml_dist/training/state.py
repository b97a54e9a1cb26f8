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
        model = model_tensors(tensors)
        expected = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in model.items()}
        if expected != found:
            odd = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
            raise CheckpointError(
                f"the checkpoint's {odd!r} has shape {found.get(odd)}, this model's has {expected.get(odd)}"
            )
        self.model.load_state_dict(model)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, slot = name.split(".", 2)
                slots.setdefault(int(number), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.ledger, self.best, self.seconds = Ledger(**facts["ledger"]), Best(**facts["best"]), float(facts["seconds"])
        self.skipped_in_a_row = int(facts["skipped_in_a_row"])


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a saved state, as `load_state_dict` takes it."""
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """sha256 in hex over names, types, shapes and bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
