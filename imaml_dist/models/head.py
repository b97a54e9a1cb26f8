"""A model cut before the module whose parameters adapt: features are computed once, and the head as often as needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.functional import FunctionalModel, over_tasks


@dataclass(frozen=True)
class Head:
    """`predict(phi, x) = outputs(head(phi), theta, features(theta, x))` where phi is theta but for the parameters that adapt.

    Attributes:
        functional: the whole model.
        layer: its last module, in which all parameters that adapt lie.
        alone: that module as a function of its own parameters.
        names: those parameters as the whole model names them, in the order of `alone`.
        moving: layout of the parameters that adapt, by the same names.
    """

    functional: FunctionalModel
    layer: nn.Module
    alone: FunctionalModel
    names: tuple[str, ...]
    moving: ParameterLayout

    def features(self, theta: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        """What the head is given for samples `x` `[T, n, ...]` under parameters `[T, P]` of the whole model: `[T, ...]`."""

        def single(params: Tensor, x: Tensor, key: Tensor | None) -> Tensor:
            return _watch(self.functional, self.layer, params, x, key)[1][0].given

        return over_tasks(single, theta, x, key)

    def outputs(self, moving: Tensor, theta: Tensor, features: Tensor) -> Tensor:
        """Outputs `[T, n, ...]` of the head with the parameters `[T, E]` that adapt, and its others from `theta` `[T, P]`."""
        named = {**self.functional.layout.unflatten(theta), **self.moving.unflatten(moving)}
        own = dict(zip(self.alone.layout.names, (named[name] for name in self.names), strict=True))
        return self.evaluate(self.alone.layout.flatten(own), features)

    def evaluate(self, own: Tensor, features: Tensor) -> Tensor:
        """Outputs `[T, n, ...]` of the head with parameters `[T, E]` in the order of `alone`.

        A linear layer of T tasks is one product of batches of matrices, which costs less than what leads to it elsewhere.
        """
        if not _plainly_linear(self.layer) or self.alone.autocast is not None or features.dim() != 3:
            return self.alone.predict(own, features)
        named = self.alone.layout.unflatten(own)
        weight = named["weight"].mT
        if "bias" not in named:
            return torch.bmm(features, weight)
        return torch.baddbmm(named["bias"].unsqueeze(1), features, weight)


def find_head(functional: FunctionalModel, moving: Sequence[str], x: Tensor, key: Tensor | None) -> Head | None:
    """The head in which the parameters named `moving` lie; None where there is none, and everything must be evaluated.

    There is one if a module other than the whole model holds these parameters and no other place does, it is called once,
    with one tensor that it does not change, drops nothing, what it returns is what the model returns, and what it is given
    does not depend on the parameters. Tried once (with keys and without) on a task whose outputs are finite.

    Args:
        functional: the model.
        moving: names of its layout, in that order.
        x: `[T, n, ...]`, samples to try it with.
        key: `[T]` int64, of the dropout masks; None: nothing is dropped.
    """

    def find(task: int) -> Head | bool | None:
        return _try(functional, moving, x[task], None if key is None else key[task])

    found = functional.tried(("head", *moving, key is None), find, len(x))
    return found if isinstance(found, Head) else None


def _try(functional: FunctionalModel, moving: Sequence[str], x: Tensor, key: Tensor | None) -> Head | bool | None:
    """The head, False if there is none, None if this task does not tell."""
    layer = _smallest(functional, moving)
    if layer is functional.module:
        return False
    with torch.no_grad():
        params = functional.parameters()
        outputs, calls = _watch(functional, layer, params, x, key)
        if len(calls) != 1 or not calls[0].simple or not calls[0].last:
            return False
        if not (calls[0].given.isfinite().all() and outputs.isfinite().all()):
            return None  # nan would hide from what it depends on
        head = _head(functional, layer, moving)
        sizes = zip(functional.layout.names, functional.layout.sizes, strict=True)
        places = torch.cat([torch.full((size,), name in moving) for name, size in sizes]).to(params.device)
        _, again = _watch(functional, layer, params.masked_fill(places, torch.nan), x, key)
        alone = head.outputs(params[places][None], params[None], calls[0].given[None])[0]
    return head if _close(again[0].given, calls[0].given) and _close(alone, outputs) else False


def _plainly_linear(layer: nn.Module) -> bool:
    """Whether a call of the layer is torch's linear map of parameters that all are learned, and nothing else."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    learned = all(parameter.requires_grad for parameter in layer.parameters())
    return type(layer) is nn.Linear and learned and "forward" not in vars(layer) and not any(hooks)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding, which may differ where numbers lie elsewhere in memory; false for nan."""
    return bool((found - expected).double().norm() <= 1e-2 * expected.double().norm())


def _head(functional: FunctionalModel, layer: nn.Module, moving: Sequence[str]) -> Head:
    name_of = {id(parameter): name for name, parameter in functional.module.named_parameters()}
    alone = FunctionalModel(layer, functional.native, functional.autocast)
    own = dict(layer.named_parameters())
    shapes = dict(zip(functional.layout.names, functional.layout.shapes, strict=True))
    return Head(
        functional=functional,
        layer=layer,
        alone=alone,
        names=tuple(name_of[id(own[name])] for name in alone.layout.names),
        moving=ParameterLayout(tuple(moving), tuple(shapes[name] for name in moving)),
    )


def _smallest(functional: FunctionalModel, moving: Sequence[str]) -> nn.Module:
    """The smallest module that holds every place of these parameters."""
    owners = [slot.split(".")[:-1] for slot, name in functional.slots.items() if name in moving]
    depth = 0
    while all(len(owner) > depth and owner[depth] == owners[0][depth] for owner in owners):
        depth += 1
    return functional.module.get_submodule(".".join(owners[0][:depth]))


@dataclass
class _Call:
    """One call of a layer: what it was given, what it returned, whether that is all there is to it, and the model's own result."""

    given: Tensor
    simple: bool
    version: int
    dropped: int
    output: Any = None
    last: bool = False


def _watch(
    functional: FunctionalModel, layer: nn.Module, params: Tensor, x: Tensor, key: Tensor | None
) -> tuple[Tensor, list[_Call]]:
    """Outputs of the model for one task, and the calls of one of its layers."""
    policy, calls = functional.policy(key), list[_Call]()

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        simple = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        given = args[0] if simple else x
        calls.append(_Call(given, simple, given._version, policy.dropped))

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls[-1]
        call.output = output
        call.simple &= call.given._version == call.version and policy.dropped == call.dropped

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for call in calls:  # told here, for what `evaluate` returns may be a cast of it
            call.last = call.output is output

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after).remove)
        stack.callback(functional.module.register_forward_hook(end).remove)
        return functional.evaluate(params, x, policy), calls
