"""What a meta-step changes: the parameters of the model, and those that the algorithm itself learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from imaml_dist.algorithms.learner import OWN, MetaLearner
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import CheckpointError

MODEL = "model."
"""What the names of the model's saved tensors begin with; those of the algorithm begin with `OWN`."""


@dataclass(frozen=True)
class MetaParameters:
    """All that is learned over meta-steps.

    Attributes:
        model: its parameters that require a gradient are learned; the rest of its state is saved with them.
        own: what the algorithm itself learns, such as a proximal strength, by name; may be empty.
        own_lr: outer learning rate of `own`; that of the model when None.
        describe: summaries of `own` for the metrics, under `algorithm_<name>_min`, `_median` and `_max`.
    """

    model: nn.Module
    own: Mapping[str, nn.Parameter] = field(default_factory=dict)
    own_lr: float | None = None
    describe: Callable[[], dict[str, float]] = dict

    def learned(self) -> dict[str, nn.Parameter]:
        """The model's parameters under their names, then the algorithm's under `algorithm.<name>`."""
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trainable | {OWN + name: p for name, p in self.own.items()}

    @property
    def layout(self) -> ParameterLayout:
        """Order of `learned` in the flat meta-gradient `[P + R]`."""
        return ParameterLayout.of(self.learned())

    def set_gradient(self, gradient: Tensor) -> None:
        """Hand the meta-gradient `[P + R]` to the parameters, for an optimiser to step them."""
        named = self.layout.unflatten(gradient)
        for name, parameter in self.learned().items():
            parameter.grad = named[name]

    def tensors(self) -> dict[str, Tensor]:
        """`model.<name>` of the whole model state, and `algorithm.<name>`; not copied."""
        state = {MODEL + name: value for name, value in self.model.state_dict().items()}
        return state | {OWN + name: parameter.detach() for name, parameter in self.own.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave; other names than `model.` and `algorithm.` are left alone.

        Raises:
            CheckpointError: names, shapes or types differ; nothing is changed then.
        """
        saved = {name: value for name, value in tensors.items() if name.startswith((MODEL, OWN))}
        expected = {name: (tuple(value.shape), value.dtype) for name, value in self.tensors().items()}
        found = {name: (tuple(value.shape), value.dtype) for name, value in saved.items()}
        if expected != found:
            odd = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            said = {True: "has shape {} of {}", False: "does not exist{}{}"}
            there, here = (said[odd in known].format(*known.get(odd, ("", ""))) for known in (found, expected))
            whose, name = ("model", odd.removeprefix(MODEL)) if odd.startswith(MODEL) else ("algorithm", odd)
            raise CheckpointError(
                f"the checkpoint's {name!r} {there}, this {whose}'s {here}; it belongs to another {whose}"
            )
        self.model.load_state_dict({n.removeprefix(MODEL): v for n, v in saved.items() if n.startswith(MODEL)})
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(saved[OWN + name])


def meta_parameters(learner: MetaLearner) -> MetaParameters:
    """What a learner learns. The one place that knows where a learner keeps it."""

    def describe() -> dict[str, float]:
        return {f"algorithm_{name}": value for name, value in learner.describe_own().items()}

    return MetaParameters(learner.model, learner.own, learner.algorithm.own_lr, describe)
