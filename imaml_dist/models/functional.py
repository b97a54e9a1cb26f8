"""Any nn.Module as a function of one flat parameter vector per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import ModelError


class FunctionalModel:
    """`predict(params [T, P], x [T, n, ...]) -> [T, n, ...]`: T copies of one module, each with its own parameters.

    The module itself only lends its structure and its buffers; nothing is written into it. All of its parameters that
    require a gradient are meta-parameters; the others stay as they are.

    Several tasks are evaluated in one vectorised call, a single task by calling the module plainly: per-task weights
    turn convolutions into grouped ones, which CPUs run slower than T ordinary ones.

    Args:
        module: any module whose output depends on parameters and input alone (see Raises).

    Raises:
        ModelError: no parameter requires a gradient, or a layer makes the objective random or dependent on history:
            dropout that is switched on, or normalisation with running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        _refuse_hidden_state(module)
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to meta-train; "
                "call requires_grad_(True) on the parameters to learn"
            )
        self.module = module
        self.layout = ParameterLayout.of(trainable)
        self._slots = _slots(module, trainable)

    def parameters(self) -> Tensor:
        """The module's own parameters as one detached vector `[P]`, in a copy."""
        named = dict(self.module.named_parameters())
        return self.layout.flatten({name: named[name].detach() for name in self.layout.names}).clone()

    def load(self, vector: Tensor) -> None:
        """Write the vector `[P]` into the module's parameters."""
        named = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in self.layout.unflatten(vector).items():
                named[name].copy_(value)

    def predict(self, params: Tensor, x: Tensor) -> Tensor:
        """Outputs `[T, n, ...]` of task t's samples `x[t]` under task t's parameters `params[t]`."""
        if params.shape[0] == 1:
            return self._single(params[0], x[0]).unsqueeze(0)
        return vmap(self._single)(params, x)

    def _single(self, params: Tensor, x: Tensor) -> Tensor:
        named = self.layout.unflatten(params)
        replaced = {slot: named[name] for slot, name in self._slots.items()}
        return functional_call(self.module, replaced, (x,), tie_weights=False)  # type: ignore[no-any-return]


def _slots(module: nn.Module, trainable: dict[str, nn.Parameter]) -> dict[str, str]:
    """Every place that holds a trainable parameter, each once, and the name under which the layout knows it.

    A weight shared by two layers has two places. A layer registered under two names is one place: torch's own handling
    of ties would fill it twice and leave the replaced weights behind in the module.
    """
    name_of = {id(parameter): name for name, parameter in trainable.items()}
    return {
        f"{owner_name}.{attribute}".lstrip("."): name_of[id(parameter)]
        for owner_name, owner in module.named_modules()
        for attribute, parameter in owner._parameters.items()
        if id(parameter) in name_of
    }


def _refuse_hidden_state(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        where = f"layer {name or '(root)'!r} ({type(layer).__name__})"
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            raise ModelError(
                f"{where} keeps running statistics, so the support loss would depend on the order of tasks; "
                "build it with track_running_stats=False to use batch statistics"
            )
        if isinstance(layer, _DropoutNd) and layer.p > 0 and layer.training:
            raise ModelError(
                f"{where} drops at random, so the support loss would differ between evaluations; set p=0 or call .eval() on it"
            )
