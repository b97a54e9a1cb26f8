"""Any nn.Module as a function of one flat parameter vector per task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase

from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import ModelError
from imaml_dist.kernels import native as kernels
from imaml_dist.models.forward_policy import ForwardPolicy


class FunctionalModel:
    """`predict(params [T, P], x [T, n, ...]) -> [T, n, ...]`: T copies of one module, each with its own parameters.

    The module itself only lends its structure and its buffers; nothing is written into it. All of its parameters that
    require a gradient are meta-parameters; the others stay as they are. Its layers' `training` flags count: see
    `models.forward_policy` for what becomes of normalisation, dropout and attention.

    Several tasks are evaluated in one vectorised call, a single task by calling the module plainly: per-task weights
    turn convolutions into grouped ones, which CPUs run slower than T ordinary ones.

    Args:
        module: any module whose output depends on parameters and input alone (see Raises, and `models.preflight`).
        native: evaluate convolutions and batch normalisations by `kernels.native` where they fit.

    Raises:
        ModelError: no parameter requires a gradient, one has no shape yet, or a layer can never work: normalisation
            across processes, embeddings with sparse gradients or renormalised weights.
        KernelError: `native`, and they cannot be compiled here.
    """

    def __init__(self, module: nn.Module, native: bool = False) -> None:
        _refuse_layers(module)
        if native:
            kernels.load()
        self._native = native
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to meta-train; "
                "call requires_grad_(True) on the parameters to learn"
            )
        self.module = module
        self.layout = ParameterLayout.of(trainable)
        self._slots = _slots(module, trainable)
        self._counters = [
            f"{name}.num_batches_tracked".lstrip(".") for name, layer in module.named_modules() if _counts(layer)
        ]
        self._independent: dict[bool, bool] = {}

    def policy(self, key: Tensor | None = None, **options: Any) -> ForwardPolicy:
        """A policy for one evaluation of the module; see `ForwardPolicy` for the options."""
        return ForwardPolicy(key, native=self._native, **options)

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

    def predict(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Outputs `[T, n, ...]` of task t's samples `x[t]` under task t's parameters `params[t]`.

        Args:
            params: `[T, P]`.
            x: `[T, n, ...]`.
            key: `[T]` int64, from which the dropout masks of a task follow; None: nothing is dropped.
        """
        return _over_tasks(self._single, params, x, key)

    def predict_inductive(self, params: Tensor, support_x: Tensor, query_x: Tensor) -> Tensor:
        """Outputs `[T, n, ...]` of query samples, each as if it were alone: batch statistics come from the support samples.

        The module is evaluated on the support samples, and then on the query samples with the means and (biased)
        variances found there, taken in the order in which batch normalisations are called. Nothing is dropped.

        Raises:
            ModelError: a query sample's output depends on the others in another way, or the two evaluations call batch
                normalisation differently often.
        """

        def single(params: Tensor, samples: tuple[Tensor, Tensor]) -> Tensor:
            support, query = samples
            seen = self.policy(collect=True)
            self._call(params, support, seen)
            policy = self.policy(statistics=seen.seen)
            outputs = self._call(params, query, policy)
            if len(policy.seen) != len(seen.seen):
                raise ModelError("batch normalisation is called more often for support than for query samples")
            return outputs

        def alone(x: Tensor) -> Tensor:
            return single(self.parameters(), (support_x[0], x))

        if not self._tried(True, lambda: _independent(alone, query_x[0])):
            raise ModelError(
                f"{type(self.module).__name__} mixes the samples of a batch in another way than by batch normalisation, so a query "
                "sample cannot be classified alone"
            )
        return _over_tasks(single, params, (support_x, query_x))

    def samples_independent(self, x: Tensor, key: Tensor | None = None) -> bool:
        """Whether samples can be evaluated one by one under parameters of their own, tried once on samples `x` `[n, ...]`.

        Batch statistics make a sample depend on all others, dropout (with this key) on its place among them, and some
        modules cannot be vectorised over parameters.
        """

        def find() -> bool:
            if not x.is_floating_point():  # what can be tried there depends on the samples, and the answer must not
                return False
            policy = self.policy(key)
            with torch.no_grad():
                self._call(self.parameters(), x, policy)
                try:
                    self.predict(self.parameters().expand(2, -1), x[[0, 0], None])
                except (
                    RuntimeError,
                    ValueError,
                ):  # not vectorised; or a batch of one sample, which batch statistics refuse
                    return False
            return not policy.dropped and _independent(lambda x: self._single(self.parameters(), x), x)

        return self._tried(False, find)

    def standalone(self, vector: Tensor) -> nn.Module:
        """An ordinary module of its own with parameters `[P]`, in evaluation mode, that predicts as `predict` does.

        Normalisation that is in training mode here has no running statistics there: it goes on to use those of the
        samples at hand.
        """
        module = copy.deepcopy(self.module)
        for layer in module.modules():
            if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        FunctionalModel(module).load(vector)
        return module.eval()

    def _tried(self, inductive: bool, find: Callable[[], bool]) -> bool:
        if inductive not in self._independent:
            self._independent[inductive] = find()
        return self._independent[inductive]

    def _single(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        return self._call(params, x, self.policy(key))

    def _call(self, params: Tensor, x: Tensor, policy: ForwardPolicy) -> Tensor:
        named = self.layout.unflatten(params)
        replaced = {slot: named[name] for slot, name in self._slots.items()}
        for counter in self._counters:  # training-mode layers count their calls, here in a copy that is thrown away
            replaced[counter] = self.module.get_buffer(counter).clone()
        with policy:
            outputs = functional_call(self.module, replaced, (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"{type(self.module).__name__} returns {type(outputs).__name__}, should return one tensor of outputs"
            )
        return outputs


def _over_tasks(single: Callable[..., Tensor], params: Tensor, *arguments: object) -> Tensor:
    """`single` for every task: arguments are tensors with a leading task axis, tuples of such, or None."""
    if params.shape[0] == 1:
        return single(params[0], *(_first(argument) for argument in arguments)).unsqueeze(0)
    in_dims = (0, *(None if argument is None else 0 for argument in arguments))
    return vmap(single, in_dims=in_dims)(params, *arguments)


def _first(argument: object) -> object:
    if isinstance(argument, tuple):
        return tuple(_first(part) for part in argument)
    return argument[0] if isinstance(argument, Tensor) else argument


def _independent(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether no sample's output depends on another sample: one is replaced, and the outputs of the others keep their bits.

    It is replaced by nan, which spreads to all that it reaches, or by another one where samples are whole numbers. False
    where that tells nothing: a single sample, or equal ones.
    """
    others = [sample for sample in x[1:] if x.is_floating_point() or not torch.equal(sample, x[0])]
    if not others:
        return False
    poisoned = x.clone()
    poisoned[0] = torch.nan if x.is_floating_point() else others[0]
    with torch.no_grad():
        clean, found = function(x), function(poisoned)
    return bool(torch.equal(clean[1:], found[1:]))


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


def _counts(layer: nn.Module) -> bool:
    return isinstance(layer, _NormBase) and layer.training and layer.num_batches_tracked is not None


def _refuse_layers(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            problem = "normalises across processes, which cannot be differentiated twice; use a BatchNorm of its kind"
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            problem = "has sparse gradients, which cannot be differentiated twice; build it with sparse=False"
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            problem = "changes its weight whenever it is read; build it with max_norm=None"
        elif any(nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            problem = "has parameters without a shape; call the module once on a sample before it is given away"
        else:
            continue
        raise ModelError(f"layer {name or '(root)'!r} ({type(layer).__name__}) {problem}")
