"""The meta-state: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from imaml_dist.errors import CheckpointError, brief
from imaml_dist.training.ledger import Ledger
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.outer import set_rate
from imaml_dist.training.schedule import ResidualCap


@dataclass
class Best:
    """The best validation so far; step -1 while there is none."""

    step: int = -1
    accuracy: float = -1.0


@dataclass
class MetaState:
    """Meta-parameters, optimiser, ledger, best validation, seconds in the loop, and what became of the meta-steps.

    Attributes:
        drawn_from: what episodes are drawn from and how, by name; a state saved under another one is not taken over.
        config: fields of the configuration, by dotted name, that a resumed run may not change; neither is one taken over that
            was saved with another value of a field that it names too.
        updates: meta-steps that were applied; the others were skipped.
        skipped_in_a_row: meta-steps skipped since the last one that was applied.
        cap: of the linear solver's iterations, where it adapts to residuals.
    """

    parameters: MetaParameters
    optimizer: torch.optim.Optimizer
    drawn_from: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    best: Best = field(default_factory=Best)
    seconds: float = 0.0
    updates: int = 0
    skipped_in_a_row: int = 0
    cap: ResidualCap | None = None

    @property
    def step(self) -> int:
        """The next meta-step to do."""
        return self.ledger.steps

    def apply(self, gradient: Tensor, rate: float) -> None:
        """Step all parameters with the meta-gradient `[P + R]`."""
        self.parameters.set_gradient(gradient)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.updates += 1
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Count a meta-step that is not applied: parameters, optimiser and schedule stand still."""
        self.skipped_in_a_row += 1

    def living_tensors(self) -> dict[str, Tensor]:
        """Those of the meta-parameters and `optimizer.<parameter number>.<name>`, as they are: not copies."""
        named = self.parameters.tensors()
        for number, slots in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": value for name, value in slots.items() if isinstance(value, Tensor)}
        return named

    def tensors(self) -> dict[str, Tensor]:
        """The same as copies on the CPU, tied weights twice."""
        return {name: value.detach().to("cpu").contiguous().clone() for name, value in self.living_tensors().items()}

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, in JSON."""
        return {
            "drawn_from": self.drawn_from,
            "config": self.config,
            "ledger": self.ledger.to_dict(),
            "best": asdict(self.best),
            "seconds": self.seconds,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            **({} if self.cap is None else {"cap": asdict(self.cap)}),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            CheckpointError: names or shapes differ from this model's or this algorithm's, a field of the configuration does, or
                episodes were drawn from others.
        """
        saved = {part: found if isinstance(found := facts.get(part), dict) else {} for part in ("drawn_from", "config")}
        for name, here in self.config.items():
            if saved["config"].get(name, here) != here:
                raise CheckpointError(
                    f"{name}: {here!r} here, but the checkpoint was written with {saved['config'][name]!r:.80}; it belongs to another "
                    "run, put this run's own back, choose another --run-dir, or start over with --fresh"
                )
        for name, here in self.drawn_from.items():
            if (before := saved["drawn_from"].get(name)) != here:
                raise CheckpointError(
                    f"the run was begun with {name} {str(before)[:12]}, and here it is {str(here)[:12]}, so that other episodes would be "
                    "drawn; put the old data set back, choose another --run-dir, or start over with --fresh"
                )
        self.parameters.load(tensors)
        try:
            stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, number, slot = name.split(".", 2)
                    if value.shape not in (stepped[int(number)].shape, torch.Size()):
                        raise ValueError(f"{name} has shape {tuple(value.shape)}")
                    slots.setdefault(int(number), {})[slot] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
            self.ledger, self.best = Ledger(**facts["ledger"]), Best(**facts["best"])
            self.seconds, self.updates = float(facts["seconds"]), int(facts["updates"])
            self.skipped_in_a_row = int(facts["skipped_in_a_row"])
            self.cap = None if self.cap is None else ResidualCap.from_dict(facts["cap"])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(
                f"the checkpoint is of another version ({brief(error)}); start over with --fresh"
            ) from error


def updates_of(facts: Any) -> int:
    """The number of applied meta-steps that the facts of a checkpoint tell.

    Raises:
        CheckpointError: they tell none.
    """
    try:
        return int(facts["updates"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the checkpoint is of another version ({brief(error)}); start over with --fresh"
        ) from error


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """sha256 in hex over names, types, shapes and bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
