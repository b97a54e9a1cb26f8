"""Any nn.Module as a function of one flat parameter vector per task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from imaml_dist.core.vector import ParameterLayout
from imaml_dist.errors import ModelError
from imaml_dist.kernels import native as kernels
from imaml_dist.models.forward_policy import ForwardPolicy

Answer = TypeVar("Answer")

_ROUNDED = {"tf32": 2.0**-10, "bf16": 2.0**-7}
"""Relative precision of the types that torch may round float32 factors to, if it is allowed to."""


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
        autocast: compute convolutions and products of matrices in this type; parameters, normalisation and all outputs keep theirs.

    Attributes:
        module, native, autocast: as given.
        layout: of the meta-parameters in a vector `[P]`.
        slots: the name in the layout for every place in the module that holds a meta-parameter.

    Raises:
        ModelError: no parameter requires a gradient, one has no shape yet, or a layer can never work: normalisation
            across processes, embeddings with sparse gradients or renormalised weights, weights normalised by a hook.
        KernelError: `native`, and they cannot be compiled here.
    """

    def __init__(self, module: nn.Module, native: bool = False, autocast: torch.dtype | None = None) -> None:
        _refuse_layers(module)
        if native:
            kernels.load()
        self.native, self.autocast = native, autocast
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to meta-train; "
                "call requires_grad_(True) on the parameters to learn"
            )
        self.module = module
        self.layout = ParameterLayout.of(trainable)
        self.slots = _slots(module, trainable)
        self._counters = [
            f"{name}.num_batches_tracked".lstrip(".") for name, layer in module.named_modules() if _counts(layer)
        ]
        self._tried: dict[Hashable, Any] = {}

    def policy(self, key: Tensor | None = None, **options: Any) -> ForwardPolicy:
        """A policy for one evaluation of the module; see `ForwardPolicy` for the options."""
        return ForwardPolicy(key, native=self.native, autocast=self.autocast, **options)

    @property
    def precision(self) -> float:
        """Relative precision of its convolutions and products of matrices, as this process computes them now."""
        parameter = next(self.module.parameters())
        found = torch.finfo(parameter.dtype).eps
        if parameter.dtype != torch.float32:  # only float32 is ever rounded to less
            return found
        if self.autocast is not None:
            found = torch.finfo(self.autocast).eps
        backends: Any = torch.backends
        gpu, cpu = (backends.cuda.matmul, backends.cudnn.conv), (backends.mkldnn.matmul, backends.mkldnn.conv)
        kernels = gpu if parameter.device.type == "cuda" else cpu
        return max(found, *(_ROUNDED.get(kernel.fp32_precision, 0.0) for kernel in kernels))

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

        Raises:
            ModelError: a batch normalisation in training mode has one value per channel.
        """
        return over_tasks(self._single, params, x, key)

    def predict_inductive(self, params: Tensor, support_x: Tensor, query_x: Tensor) -> Tensor:
        """Outputs `[T, n, ...]` of query samples, each as if it were alone: batch statistics come from the support samples.

        The module is evaluated on the support samples, and then on the query samples with the means and (biased)
        variances found there, taken in the order in which batch normalisations are called. Nothing is dropped. That nothing
        else connects the samples is tried once, on a task whose outputs are finite; until there is one, the query samples
        are evaluated one by one.

        Args:
            params: `[T, P]`.
            support_x: `[T, n, ...]`.
            query_x: `[T, m, ...]`; m = 1 will do.

        Raises:
            ModelError: a query sample's output depends on the others in another way, or the two evaluations call batch
                normalisation differently often.
        """

        def single(params: Tensor, samples: tuple[Tensor, Tensor]) -> Tensor:
            support, query = samples
            seen = self.policy(collect=True)
            self.evaluate(params, support, seen)
            policy = self.policy(statistics=seen.seen)
            outputs = self.evaluate(params, query, policy)
            if len(policy.seen) != len(seen.seen):
                raise ModelError("batch normalisation is called more often for support than for query samples")
            return outputs

        def alone(task: int) -> bool | None:
            # Support samples too, for a single query sample has none beside it.
            together = torch.cat([support_x[task], query_x[task]])
            return _independent(lambda x: single(self.parameters(), (support_x[task], x)), together)

        independent = self.tried("inductive", alone, len(query_x))
        if independent is False:
            raise ModelError(
                f"{type(self.module).__name__} mixes the samples of a batch in another way than by batch normalisation, so a query "
                "sample cannot be classified alone"
            )
        parts = [query_x] if independent else torch.chunk(query_x, query_x.shape[1], dim=1)
        return torch.cat([over_tasks(single, params, (support_x, part)) for part in parts], dim=1)

    def samples_independent(self, x: Tensor, key: Tensor | None = None) -> bool:
        """Whether samples can be evaluated one by one under parameters of their own.

        Batch statistics make a sample depend on all others, dropout on its place among them, and some modules cannot be
        vectorised over parameters. Tried once with keys and once without, on a task whose outputs are finite; false, and
        open for the next call, as long as there is none.

        Args:
            x: `[T, n, ...]`.
            key: `[T]` int64, of the dropout masks; None: nothing is dropped.
        """

        def find(task: int) -> bool | None:
            if not x.is_floating_point():  # what can be tried there depends on the samples, and the answer must not
                return False
            samples = x[task] if x.shape[1] > 1 else x[task].expand(2, *x.shape[2:])
            policy = self.policy(None if key is None else key[task])
            with torch.no_grad():
                self.evaluate(self.parameters(), samples, policy)
                try:
                    self.predict(self.parameters().expand(2, -1), samples[[0, 0], None])
                except torch.OutOfMemoryError:  # says nothing
                    raise
                except Exception:  # not vectorised, or one sample has no batch statistics
                    return False
            return False if policy.dropped else _independent(lambda x: self._single(self.parameters(), x), samples)

        return bool(self.tried(("independent", key is None), find, len(x)))

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

    def tried(self, what: Hashable, find: Callable[[int], Answer | None], tasks: int) -> Answer | None:
        """What `find` answers for the first of so many tasks that tells, remembered; None where none does, to be asked again."""
        if what not in self._tried:
            answer = next((answer for task in range(tasks) if (answer := find(task)) is not None), None)
            if answer is None:
                return None
            self._tried[what] = answer
        found: Answer = self._tried[what]
        return found

    def _single(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        return self.evaluate(params, x, self.policy(key))

    def evaluate(self, params: Tensor, x: Tensor, policy: ForwardPolicy) -> Tensor:
        """Outputs `[n, ...]` of samples `x` `[n, ...]` under parameters `[P]`: one task, one call of the module."""
        named = self.layout.unflatten(params)
        replaced = {slot: named[name] for slot, name in self.slots.items()}
        for counter in self._counters:  # training-mode layers count their calls, here in a copy that is thrown away
            replaced[counter] = self.module.get_buffer(counter).clone()
        with policy:
            outputs = functional_call(self.module, replaced, (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"{type(self.module).__name__} returns {type(outputs).__name__}, should return one tensor of outputs"
            )
        return outputs if self.autocast is None else outputs.to(params.dtype)


def over_tasks(single: Callable[..., Tensor], params: Tensor, *arguments: object) -> Tensor:
    """`single` for every task: arguments are tensors with a leading task axis, tuples of such, or None."""
    if params.shape[0] == 1:
        return single(params[0], *(_first(argument) for argument in arguments)).unsqueeze(0)
    in_dims = (0, *(None if argument is None else 0 for argument in arguments))
    return vmap(single, in_dims=in_dims)(params, *arguments)


def _first(argument: object) -> object:
    if isinstance(argument, tuple):
        return tuple(_first(part) for part in argument)
    return argument[0] if isinstance(argument, Tensor) else argument


def _independent(function: Callable[[Tensor], Tensor], x: Tensor) -> bool | None:
    """Whether no sample's output depends on another sample: one is replaced, and the outputs of the others keep their bits.

    It is replaced by nan, which spreads to all that it reaches, or by another one where samples are whole numbers. None
    where that tells nothing: a single sample, equal ones, or outputs that are not finite anyhow.
    """
    others = [sample for sample in x[1:] if x.is_floating_point() or not torch.equal(sample, x[0])]
    if not others:
        return None
    poisoned = x.clone()
    poisoned[0] = torch.nan if x.is_floating_point() else others[0]
    with torch.no_grad():
        clean, found = (
            function(x.clone()),
            function(poisoned),
        )  # both at the beginning of a block of memory, for equal bits
    return bool(torch.equal(clean[1:], found[1:])) if clean.isfinite().all() else None


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


def _normalised_by_hook(layer: nn.Module) -> str | None:
    """Which of torch's normalisations computes a weight of the layer before each call, if one does."""
    kinds = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
    return next((kinds[type(hook)] for hook in layer._forward_pre_hooks.values() if type(hook) in kinds), None)


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
        elif kind := _normalised_by_hook(layer):
            problem = f"keeps the weight that a hook computed last, which cannot be copied; use torch.nn.utils.parametrizations.{kind}"
        else:
            continue
        raise ModelError(f"layer {name or '(root)'!r} ({type(layer).__name__}) {problem}")
