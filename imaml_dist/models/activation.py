"""The function between a network's layers: the rectifier, or one of its smooth relatives."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

SHARPNESS = 1.0
"""Softplus's beta where nothing is said."""

LINEAR_FROM = 40.0
"""`beta x` from which softplus is x: exp(-40) is less than float64 tells from 0 beside it. Torch's own 20 leaves a step of 2e-9."""


class Activation(nn.Module):
    """One function, entry by entry; without parameters.

    | name | f(x) |
    |---|---|
    | `relu` | max(x, 0) |
    | `silu` | x / (1 + exp(-x)) |
    | `gelu` | x Phi(x), Phi being the normal distribution function |
    | `softplus` | log(1 + exp(beta x)) / beta: the rectifier in the limit of a large beta, and never more than log(2) / beta above it |

    Args:
        name: of the table.
        beta: inverse temperature of `softplus`, above 0.

    Raises:
        ValueError: another name, a beta that is not positive and finite, or one for a function that has none.
    """

    def __init__(self, name: str, beta: float = SHARPNESS) -> None:
        super().__init__()
        if name not in _FUNCTIONS:
            allowed = ", ".join(_FUNCTIONS)
            raise ValueError(f"activation: {name!r} given, must be one of {allowed}; choose one of them")
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"softplus_beta: {beta} given, must be positive and finite; 1 is usual")
        if name != "softplus" and beta != SHARPNESS:
            raise ValueError(f"softplus_beta: {beta} given, but {name!r} has none; remove it or choose 'softplus'")
        self.name, self.beta = name, beta

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return _FUNCTIONS[self.name](x, self.beta)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.name}, beta={self.beta}" if self.name == "softplus" else self.name


_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda x, beta: F.relu(x),
    "silu": lambda x, beta: F.silu(x),
    "gelu": lambda x, beta: F.gelu(x),
    "softplus": lambda x, beta: F.softplus(x, beta, LINEAR_FROM),
}
