"""Batch normalisation and the activation behind it as one layer, so that one pass over memory can do both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from imaml_dist.models.activation import Activation


class BatchNormActivation2d(nn.Module):
    """`f(gamma z + beta)`, z being the input less its mean over its standard deviation, channel by channel.

    Mean and (biased) variance are always those of the samples at hand, in training and in evaluation. The parameters have the
    names that `nn.BatchNorm2d` gives them.

    Args:
        channels: C of inputs `[n, C, h, w]`.
        activation: f.
        eps: added to the variance.

    Source: Ioffe and Szegedy, "Batch normalization" (2015), algorithm 1.
    """

    def __init__(self, channels: int, activation: Activation, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.activation = activation
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[n, C, h, w] -> [n, C, h, w]`."""
        return batch_norm_activation(x, self.weight, self.bias, self.eps, self.activation)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{len(self.weight)}, eps={self.eps}"


def batch_norm_activation(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: Activation) -> Tensor:
    """Two of torch's functions, or what a `ForwardPolicy` puts in their place."""
    if has_torch_function((x, weight, bias)):  # also while a policy is active
        found: Tensor = handle_torch_function(
            batch_norm_activation, (x, weight, bias), x, weight, bias, eps, activation
        )
        return found
    return activation(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps))  # type: ignore[no-any-return]
