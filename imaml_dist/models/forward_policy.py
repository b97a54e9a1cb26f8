"""What a user's layers do inside of an objective: the same for the same input, no state written, differentiable twice.

| layer | policy |
|---|---|
| batch normalisation, training | statistics of the samples at hand (two values a channel or more); running ones are not read nor written |
| batch normalisation, evaluation | its running statistics, as constants |
| dropout, training | a mask that follows from the task's key; without a key nothing is dropped |
| attention | torch's mathematics without its fused kernels, which have no second derivative |
| weight normalisation | the same function; torch's kernel has a wrong second derivative |
| embedding with `padding_idx` | no gradient for the padding, as in torch, also in vectorised calls |

Where asked to, convolutions and batch normalisations on the CPU go to `kernels.native`: the same functions, faster. Their
results lie in memory with the channels last, which a few of torch's functions cannot take under vmap, or only slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from imaml_dist.errors import ModelError
from imaml_dist.kernels import native as kernels
from imaml_dist.models.activation import Activation
from imaml_dist.models.attention import attention, multi_head_attention
from imaml_dist.models.batch_norm_activation import batch_norm_activation
from imaml_dist.models.masks import derived_key, keep_mask

Statistics = tuple[Tensor, Tensor]
"""Mean and variance per channel."""


class ForwardPolicy(TorchFunctionMode):
    """Applies the policy to the torch functions called in a `with` block: one evaluation of a module for one task.

    Args:
        key: int64 without axes, from which dropout masks follow; None: nothing is dropped.
        statistics: of every batch normalisation in training, in order of their calls, to be used in place of those of
            the samples at hand.
        collect: note the statistics of the samples at hand in `seen`.
        native: use the kernels of `kernels.native`, which must be loaded, where they fit.
        autocast: compute convolutions and products of matrices in this type, as `torch.autocast` does.

    Attributes:
        seen: statistics collected or used so far.
        dropped: how often something was dropped.
        native: as given.
    """

    def __init__(
        self,
        key: Tensor | None = None,
        statistics: Sequence[Statistics] | None = None,
        collect: bool = False,
        native: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.seen: list[Statistics] = []
        self.dropped = 0
        self._key = key
        self._statistics = statistics
        self._collect = collect
        self.native = native
        self._casts: list[torch.autocast] = []
        if autocast is not None:  # without its cache, which would keep the casts of another evaluation's parameters
            self._casts = [torch.autocast(kind, autocast, cache_enabled=False) for kind in _devices()]

    def __enter__(self) -> ForwardPolicy:
        for cast in self._casts:
            cast.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for cast in reversed(self._casts):
            cast.__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = _OWN.get(func)
        return func(*args, **(kwargs or {})) if own is None else own(self, *args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        input = self._uncast(input)
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        if self._statistics is not None:
            if len(self.seen) == len(self._statistics):
                raise ModelError("batch normalisation is called more often for query than for support samples")
            mean, variance = self._statistics[len(self.seen)]
            self.seen.append((mean, variance))
            return F.batch_norm(input, mean, variance, weight, bias, False, momentum, eps)
        if input.numel() == input.shape[1]:
            raise ModelError(
                f"batch normalisation of an input of shape {tuple(input.shape)}: one value per channel has no statistics; give two "
                "samples or more, or use running statistics (.eval() on the layer) or another normalisation"
            )
        if self._collect:
            axes = [axis for axis in range(input.dim()) if axis != 1]
            self.seen.append((input.mean(axes), input.var(axes, correction=0)))
        if weight is not None and bias is not None and self._takes_norm(input, weight, bias):
            return kernels.batch_norm(input, weight, bias, eps)
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)

    def _batch_norm_activation(
        self, input: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: Activation
    ) -> Tensor:
        if self._statistics is None and not self._collect and self._takes_norm(input, weight, bias):
            return kernels.batch_norm(input, weight, bias, eps, activation.name, activation.beta)
        return activation(self._batch_norm(input, None, None, weight, bias, training=True, eps=eps))  # type: ignore[no-any-return]

    def _uncast(self, input: Tensor) -> Tensor:
        """Statistics of rounded numbers are taken without more rounding."""
        return input.float() if self._casts and input.dtype == torch.bfloat16 else input

    def _takes_norm(self, input: Tensor, weight: Tensor, bias: Tensor) -> bool:
        several = input.dim() == 4 and input.numel() > input.shape[1]  # a single value a channel is refused
        return self.native and several and kernels.takes(input, weight, bias)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        strides, paddings = _sides(stride), _sides(padding)
        plain = groups == 1 and _sides(dilation) == {1} and len(strides) == 1 and len(paddings) == 1
        if self.native and plain and input.dim() == 4 and kernels.takes(input, weight, bias):
            return kernels.conv2d(input, weight, bias, *strides, *paddings)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def _view(self, input: Tensor, *shape: Any, **options: Any) -> Tensor:
        if self.native and shape and not isinstance(shape[0], torch.dtype) and not input.is_contiguous():
            return input.reshape(*shape)
        return input.view(*shape, **options)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        input = self._uncast(input)
        if use_input_stats:
            running_mean = running_var = None
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **options: Any
    ) -> Tensor:
        outputs: Tensor = F.embedding(input, weight, None, *others, **options)
        if padding_idx is None:
            return outputs
        padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)  # torch's own rule is lost under vmap
        return torch.where(padding, outputs.detach(), outputs)

    def _weight_norm(self, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        """`g v / ||v||`; the second derivative of torch's own kernel is wrong."""
        axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim]
        length: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
        return v * (g / length)

    def _mask(self, shape: Sequence[int], p: float) -> Tensor | None:
        """The next mask; None if nothing is to be dropped."""
        if self._key is None or p == 0:
            return None
        self.dropped += 1
        return keep_mask(derived_key(self._key, self.dropped), shape, p)

    def _drop(self, input: Tensor, p: float, axes: int | None = None) -> Tensor:
        """Entries set to zero with probability `p`, the others divided by 1 - p; whole slices below the first `axes`."""
        shape = input.shape if axes is None else input.shape[:axes] + (1,) * (input.dim() - axes)
        mask = self._mask(shape, p)
        return input if mask is None else torch.where(mask, input / max(1 - p, 1e-9), 0.0)

    def _drop_alpha(self, input: Tensor, p: float, axes: int | None = None) -> Tensor:
        """Entries set to the value at which SELU saturates, then scaled and shifted so that mean 0 and variance 1 stay.

        Source: Klambauer et al., "Self-normalizing neural networks" (2017).
        """
        shape = input.shape if axes is None else input.shape[:axes] + (1,) * (input.dim() - axes)
        mask = self._mask(shape, p)
        if mask is None:
            return input
        if p == 1:
            return torch.zeros_like(input)
        saturated = -1.7580993408473766
        scale = math.sqrt(1 / ((1 - p) * (1 + p * saturated**2)))
        return torch.where(mask, input, saturated) * scale - scale * p * saturated

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs, dropout=self._drop)

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        return multi_head_attention(self._drop)(*args, **kwargs)


def _dropout(drop: Callable[..., Tensor], axes: int | None = None, batched_from: int = 0) -> Callable[..., Tensor]:
    """One of torch's dropout functions.

    Args:
        drop: what happens to a tensor.
        axes: leading axes that are dropped one by one.
        batched_from: dimensions an input has if it has a batch axis; one axis fewer is a single sample.
    """

    def replacement(
        policy: ForwardPolicy, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **kw: bool
    ) -> Tensor:
        if not kw.get("train", training):
            return input
        single = batched_from == input.dim() + 1
        result = drop(policy, input.unsqueeze(0), p, axes).squeeze(0) if single else drop(policy, input, p, axes)
        return input.copy_(result) if inplace else result

    return replacement


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _sides(size: str | int | Sequence[int]) -> set[Any]:
    """The sizes along height and width, once each; none where they are named by a word."""
    return set() if isinstance(size, str) else {size} if isinstance(size, int) else set(size)


def _of_contiguous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, of the input with the channels in torch's own order."""

    def replacement(policy: ForwardPolicy, input: Tensor, *others: Any, **options: Any) -> Tensor:
        return function(input.contiguous() if policy.native else input, *others, **options)

    return replacement


_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: ForwardPolicy._batch_norm,
    batch_norm_activation: ForwardPolicy._batch_norm_activation,
    F.conv2d: ForwardPolicy._conv2d,
    F.group_norm: _of_contiguous(F.group_norm),
    F.adaptive_avg_pool2d: _of_contiguous(F.adaptive_avg_pool2d),
    Tensor.view: ForwardPolicy._view,
    F.instance_norm: ForwardPolicy._instance_norm,
    F.embedding: ForwardPolicy._embedding,
    torch._weight_norm: ForwardPolicy._weight_norm,
    F.dropout: _dropout(ForwardPolicy._drop),
    torch.dropout: _dropout(ForwardPolicy._drop),
    F.dropout1d: _dropout(ForwardPolicy._drop, axes=2, batched_from=3),
    F.dropout2d: _dropout(ForwardPolicy._drop, axes=2),
    F.dropout3d: _dropout(ForwardPolicy._drop, axes=2, batched_from=5),
    F.alpha_dropout: _dropout(ForwardPolicy._drop_alpha),
    F.feature_alpha_dropout: _dropout(ForwardPolicy._drop_alpha, axes=2),
    F.scaled_dot_product_attention: ForwardPolicy._attention,
    F.multi_head_attention_forward: ForwardPolicy._multi_head_attention,
}
"""torch functions that are replaced; all others are left alone."""
