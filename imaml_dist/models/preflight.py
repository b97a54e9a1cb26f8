"""Whether a model can be meta-trained, tried on real samples before anything is computed with it.

A random or history-dependent forward pass, a layer without second derivatives, or one that cannot be vectorised over
tasks would end in a wrong meta-gradient or in an error deep inside torch. Here it is refused by the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from imaml_dist.errors import ModelError
from imaml_dist.models.forward_policy import ForwardPolicy
from imaml_dist.models.functional import FunctionalModel

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Relative difference allowed between the vectorised and the plain evaluation; 5e-2 for other types."""


def preflight(functional: FunctionalModel, x: Tensor, key: Tensor, *, vectorised: bool) -> None:
    """Refuse a model that cannot be meta-trained.

    In this order: the forward pass is repeated and must give the same bits; it must leave buffers and parameters as they
    were; a function of its outputs is differentiated twice; and two tasks vectorised must agree with one at a time.

    Args:
        functional: the model.
        x: `[T, n, ...]`, T >= 1, finite samples such as it will be trained on.
        key: `[T]`, of the dropout masks.
        vectorised: whether several tasks will be evaluated in one call.

    Raises:
        ModelError: one of these fails; the message names the layer where it can be found, and the way out.
    """
    state = {name: value.clone() for name, value in functional.module.state_dict().items()}
    params = functional.parameters()[None]
    with torch.no_grad():
        first, second = (functional.predict(params, x[:1], key[:1]) for _ in range(2))
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
    _differentiate_twice(functional, x, key)
    if vectorised:
        _vectorise(functional, x, key)


def _differentiate_twice(functional: FunctionalModel, x: Tensor, key: Tensor) -> None:
    def square(params: Tensor) -> Tensor:
        return functional.predict(params, x[:1], key[:1]).square().sum()

    params = functional.parameters()[None].requires_grad_()
    try:
        _second_derivative(square, params)
    except RuntimeError as error:
        where = _layer_without_derivatives(functional, x[0], key[0])
        raise ModelError(
            f"{where} cannot be differentiated twice ({_first_line(error)}); replace it, or freeze what comes before it and it by "
            "requires_grad_(False)"
        ) from error


def _second_derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    (gradient,) = torch.autograd.grad(function(at), at, create_graph=True)
    if gradient.requires_grad:  # else the function is linear, and its second derivative zero
        _refuse_dead_ends(gradient)
        torch.autograd.grad(gradient.sum(), at, allow_unused=True)


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
    pair, keys = _roughened(x[[0, -1]]), key[[0, -1]]
    params = functional.parameters().expand(2, -1)
    way_out = "set execution='loop' (run.execution: loop) to compute one task after the other"
    with torch.no_grad():
        plain = torch.cat([functional.predict(params[t : t + 1], pair[t : t + 1], keys[t : t + 1]) for t in (0, 1)])
        try:
            together = functional.predict(params, pair, keys)
        except RuntimeError as error:
            raise ModelError(
                f"{type(functional.module).__name__} cannot be vectorised over tasks ({_first_line(error)}); {way_out}"
            ) from error
    scale = float(plain.abs().max()) or 1.0
    difference = float((together - plain).abs().max()) / scale
    if not difference <= AGREEMENT.get(plain.dtype, 5e-2):
        raise ModelError(
            f"{type(functional.module).__name__} gives other outputs vectorised over tasks than for one task alone (relative "
            f"difference {difference:.1e}); {way_out}"
        )


def _roughened(x: Tensor) -> Tensor:
    """Samples with some noise: normalisation of what is constant would enlarge rounding to any size."""
    if not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    return x + 0.1 * (1.0 + x.abs().max()) * noise


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
            with ForwardPolicy(key):
                output = layer(at, *rest)
            return sum((part.square().sum() for part in _tensors(output)), at.new_zeros(()))

        try:
            _second_derivative(square, numbers[0].clone().requires_grad_())
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
