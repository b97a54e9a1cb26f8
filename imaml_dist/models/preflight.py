"""Whether a model can be meta-trained, tried on real samples before anything is computed with it.

A random or history-dependent forward pass, a layer without second derivatives, or one that cannot be vectorised over
tasks would end in a wrong meta-gradient or in an error deep inside torch. Here it is refused by the layer's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from imaml_dist.errors import ModelError, brief
from imaml_dist.models.functional import FunctionalModel

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Relative difference allowed between the vectorised and the plain evaluation; `COARSE` for other types and under autocast."""

COARSE = 0.2

POINTS = 3
"""At which second derivatives are compared, one after the other while they disagree: kinks spoil single points, a wrong formula all."""


def preflight(functional: FunctionalModel, x: Tensor, key: Tensor, *, vectorised: bool, twice: bool = True) -> None:
    """Refuse a model that cannot be meta-trained.

    In this order: the forward pass is repeated and must give the same bits; it must leave buffers and parameters as they
    were; outputs and gradients must be finite; gradients must be those of a copy of the module that owns the parameters;
    second derivatives must exist, and must be the central differences of the first in a float64 copy, at one of a few points at
    least; two tasks vectorised must agree with one at a time, in outputs and gradients.

    Args:
        functional: the model.
        x: `[T, n, ...]`, T >= 1, finite samples such as it will be trained on.
        key: `[T]`, of the dropout masks.
        vectorised: whether several tasks will be evaluated in one call.
        twice: whether second derivatives will be needed.

    Raises:
        ModelError: one of these fails; the message names the layer where it can be found, and the way out.
    """
    state = {name: value.clone() for name, value in functional.module.state_dict().items()}
    params = functional.parameters()[None]
    with torch.no_grad():
        first, second = (functional.predict(params, x[:1], key[:1]) for _ in range(2))
    if first.shape[:2] != x[:1].shape[:2]:
        raise ModelError(
            f"{type(functional.module).__name__} gives outputs of shape {tuple(first.shape[1:])} for {x.shape[1]} samples, should give "
            "one row for each"
        )
    if not _same(first, second):
        raise ModelError(
            f"{_odd_layer(functional, x[0], key[0])} gives different outputs for the same input, so the support loss would have no "
            "gradient to speak of; remove what is random or remembers earlier calls (dropout by torch's own functions is fine)"
        )
    for name, value in functional.module.state_dict().items():
        if not _same(value, state[name]):
            raise ModelError(
                f"{_owner(functional.module, name)} changes {name!r} whenever it is called; call .eval() on it, or let its forward leave "
                "its state alone"
            )
    if not first.isfinite().all():
        raise ModelError(f"{type(functional.module).__name__} gives outputs that are not finite for finite samples")
    if not functional.predict(params.requires_grad_(), x[:1], key[:1]).requires_grad:
        raise ModelError(
            f"the outputs of {type(functional.module).__name__} do not depend on its parameters, so nothing could be learned; do not "
            "detach them, nor compute them under torch.no_grad()"
        )
    rough = _roughened(x)
    slopes = (_gradient(functional, at, rough[:1], key[:1]) for at in (params, _moved(functional.parameters())[None]))
    if not all(slope.norm().isfinite() for slope in slopes):
        raise ModelError(
            f"{type(functional.module).__name__} gives outputs or gradients that are not finite for samples near the finite ones given, "
            f"whose largest number is {float(x.abs().max()):.1e}; scale the samples down, or remove what overflows"
        )
    _compare_with_module(functional, rough[:1], key[:1])
    if twice:
        _differentiate_twice(functional, rough[:1], key[:1])
    if vectorised:
        _vectorise(functional, rough, key)


def can_be_tried(functional: FunctionalModel, x: Tensor, key: Tensor) -> bool:
    """Whether `preflight` can tell something by these samples: the model and its derivatives do not overflow on them.

    Args:
        functional: the model.
        x: `[1, n, ...]`, finite.
        key: `[1]`, of the dropout masks.
    """
    params = functional.parameters()[None].requires_grad_()
    with torch.enable_grad():
        outputs = functional.predict(params, x, key)
    if not outputs.requires_grad or not outputs.isfinite().all():
        return not outputs.requires_grad  # which is refused whatever the samples
    # Squared, which leaves room for what is larger elsewhere.
    return bool(_gradient(functional, params, _roughened(x), key).square().sum().isfinite())


def _gradient(functional: FunctionalModel, params: Tensor, x: Tensor, key: Tensor, graph: bool = False) -> Tensor:
    """Of the sum of squared outputs, `[T, P]`."""
    point = params if graph else params.detach().requires_grad_()
    with torch.enable_grad():
        value = functional.predict(point, x, key).square().sum()
    return torch.autograd.grad(value, point, create_graph=graph, materialize_grads=True)[0]


def _compare_with_module(functional: FunctionalModel, x: Tensor, key: Tensor) -> None:
    """The gradient at parameters that are not the module's own must be that of a copy which owns them."""
    params = _moved(functional.parameters())
    twin = FunctionalModel(copy.deepcopy(functional.module))
    twin.load(params)
    with functional.policy(key[0]):
        value = twin.module(x[0]).square().sum()
    named = dict(twin.module.named_parameters())
    own = torch.autograd.grad(value, [named[name] for name in twin.layout.names], materialize_grads=True)
    expected = twin.layout.flatten(dict(zip(twin.layout.names, own, strict=True)))
    difference = _relative(_gradient(functional, params[None], x, key)[0], expected)
    if not difference <= 0.1 * _agreement(functional, expected.dtype):  # the same operations in the same order
        raise ModelError(
            f"{type(functional.module).__name__} gives a wrong gradient at parameters that are not its own (relative difference "
            f"{difference:.1e}): something in its forward goes back to the module's own, as torch.utils.checkpoint does; remove it"
        )


def _differentiate_twice(functional: FunctionalModel, x: Tensor, key: Tensor) -> None:
    try:
        second_derivative(lambda at: functional.predict(at, x, key).square().sum(), functional.parameters()[None])
    except RuntimeError as error:
        where = _layer_without_derivatives(functional, x[0], key[0])
        raise ModelError(
            f"{where} cannot be differentiated twice ({brief(error)}); replace it, or freeze what comes before it and it by "
            "requires_grad_(False)"
        ) from error
    # In float64, where differences are sharp: some kernels return second derivatives that are wrong.
    double = FunctionalModel(copy.deepcopy(functional.module).double())
    x = x.double() if x.is_floating_point() else x
    try:
        distances = []
        for seed in range(POINTS):
            distances.append(_second_derivatives_off(double, x, key, seed))
            if distances[-1] is None:
                return
    except RuntimeError:  # it takes another type only
        return
    raise ModelError(
        f"{type(functional.module).__name__} has wrong second derivatives (relative difference "
        f"{distances[0]:.1e} to differences of its gradient): some function in its forward does not support them; "
        "replace it, or use a first-order algorithm"
    )


def _second_derivatives_off(double: FunctionalModel, x: Tensor, key: Tensor, seed: int) -> float | None:
    """How far they are from differences of the gradient at a point of its own for every seed; None where they agree.

    At a single point they may be right and the differences not: where a rectifier's kink lies between their two ends.
    """
    point = _moved(double.parameters(), seed)[None].requires_grad_()
    gradient = _gradient(double, point, x, key, graph=True)
    # Not along what has no gradient by rule, as the padding of an embedding.
    along = _noise(point, seed) * point.detach().abs().mean() * (gradient.detach() != 0)
    (found,) = torch.autograd.grad((gradient * along).sum(), point, materialize_grads=True)
    ahead, behind = (_gradient(double, point + step * along, x, key) for step in (1e-6, -1e-6))
    expected = (ahead - behind) / 2e-6
    slack = 1e-6 * float(gradient.detach().norm())
    if float((found - expected).norm()) <= 0.01 * float(expected.norm()) + slack:
        return None
    return _relative(found, expected)


def second_derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Raises RuntimeError where there is none."""
    point = at.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(function(point), point, create_graph=True, materialize_grads=True)
    if gradient.requires_grad:  # else the function is linear, and its second derivative zero
        _refuse_dead_ends(gradient)
        torch.autograd.grad(gradient.sum(), point, allow_unused=True)


def _refuse_dead_ends(gradient: Tensor) -> None:
    """A backward pass marked `once_differentiable` ends the graph, and torch leaves the rest out without a word."""
    waiting, met = [gradient.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        if type(node).__name__ == "Error":
            raise RuntimeError("its backward pass is marked once_differentiable")
        met.add(node)
        waiting += [following for following, _ in node.next_functions]


def _vectorise(functional: FunctionalModel, x: Tensor, key: Tensor) -> None:
    pair, keys = x[[0, -1]], key[[0, -1]]
    params = torch.stack([functional.parameters(), _moved(functional.parameters())])
    way_out = "set execution='loop' (run.execution: loop) to compute one task after the other"
    single = [slice(t, t + 1) for t in (0, 1)]
    with torch.no_grad():
        plain = torch.cat([functional.predict(params[t], pair[t], keys[t]) for t in single])
    slopes = torch.cat([_gradient(functional, params[t], pair[t], keys[t]) for t in single])
    try:
        with torch.no_grad():
            together = functional.predict(params, pair, keys)
        slopes_together = _gradient(functional, params, pair, keys)
    except RuntimeError as error:
        raise ModelError(
            f"{type(functional.module).__name__} cannot be vectorised over tasks ({brief(error)}); {way_out}"
        ) from error
    for what, found, expected in (("outputs", together, plain), ("gradients", slopes_together, slopes)):
        difference = _relative(found, expected)
        if not difference <= _agreement(functional, plain.dtype):
            raise ModelError(
                f"{type(functional.module).__name__} gives other {what} vectorised over tasks than for one task alone (relative "
                f"difference {difference:.1e}); {way_out}"
            )


def _agreement(functional: FunctionalModel, dtype: torch.dtype) -> float:
    return COARSE if functional.autocast is not None else AGREEMENT.get(dtype, COARSE)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


def _noise(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def _moved(params: Tensor, seed: int = 0) -> Tensor:
    """Other parameters near these."""
    return params + 0.2 * (params.abs().mean() + 1e-3) * _noise(params, seed)


def _roughened(x: Tensor) -> Tensor:
    """Samples with some noise: normalisation of what is constant would enlarge rounding to any size."""
    return x + 0.1 * (1.0 + x.abs().max()) * _noise(x) if x.is_floating_point() else x


def _odd_layer(functional: FunctionalModel, x: Tensor, key: Tensor) -> str:
    """The first layer whose output differs between two calls with equal inputs."""
    runs = [_calls(functional, x, key) for _ in range(2)]
    for (name, layer, inputs, output), (_, _, again, other) in zip(*runs, strict=False):
        if all(map(_same, inputs, again)) and not _same(output, other):
            return _named(name, layer)
    return _named("", functional.module)


def _layer_without_derivatives(functional: FunctionalModel, x: Tensor, key: Tensor) -> str:
    """The first layer that alone, on the inputs it is called with, cannot be differentiated twice."""
    for name, layer, inputs, _ in _calls(functional, x, key):
        numbers = [value for value in inputs if value.is_floating_point()]
        if not numbers or len(numbers) != len(inputs):
            continue

        def square(at: Tensor, layer: nn.Module = layer, rest: list[Tensor] = numbers[1:]) -> Tensor:
            with functional.policy(key):
                output = layer(at, *rest)
            return sum((part.square().sum() for part in _tensors(output)), at.new_zeros(()))

        try:
            second_derivative(square, numbers[0])
        except RuntimeError:
            return _named(name, layer)
    return _named("", functional.module)


def _calls(
    functional: FunctionalModel, x: Tensor, key: Tensor
) -> list[tuple[str, nn.Module, list[Tensor], list[Tensor]]]:
    """Every call of a layer without layers of its own, in order: name, layer, inputs and outputs."""
    calls: list[tuple[str, nn.Module, list[Tensor], list[Tensor]]] = []

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            calls.append((name, layer, [v.clone() for v in _tensors(inputs)], [v.clone() for v in _tensors(output)]))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, layer in functional.module.named_modules():
            if not any(True for _ in layer.children()):
                stack.callback(layer.register_forward_hook(remember(name)).remove)
        functional.predict(functional.parameters()[None], x[None], key[None])
    return calls


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def _same(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> bool:
    """Bit for bit, nan being equal to nan."""
    if isinstance(a, list) or isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _owner(module: nn.Module, tensor: str) -> str:
    name = tensor.rpartition(".")[0]
    return _named(name, module.get_submodule(name))


def _named(name: str, layer: nn.Module) -> str:
    return f"layer {name or '(root)'!r} ({type(layer).__name__})"
