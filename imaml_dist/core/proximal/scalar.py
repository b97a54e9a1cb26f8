"""The paper's regulariser: one proximal strength for all parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScalarProximal:
    """`Lambda = lam I`.

    Args:
        lam: proximal strength lambda > 0, in units of loss per squared parameter; a number, or a tensor of one entry.

    Raises:
        ValueError: `lam` is a number that is not positive and finite.

    Source: iMAML eq. 3-4.
    """

    lam: float | Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.lam, Tensor) and not (self.lam > 0.0 and math.isfinite(self.lam)):
            raise ValueError(f"lam must be a positive finite number, got {self.lam}")

    def value(self, delta: Tensor) -> Tensor:
        """`lam/2 ||delta||^2`: `[T, P]` -> `[T]`."""
        return 0.5 * self.lam * (delta * delta).sum(-1)

    def apply(self, v: Tensor) -> Tensor:
        """`lam v`."""
        return self.lam * v

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """`base + lam v`."""
        if isinstance(self.lam, Tensor):
            return torch.addcmul(base, v, self.lam)
        return torch.add(base, v, alpha=self.lam)

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`v / (lam + shift)`."""
        return v / (self.lam + shift)

    def diagonal(self) -> Tensor:
        """`[1]`, lambda: the same for every parameter."""
        return torch.as_tensor(self.lam).reshape(1)

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """`{"lam": -u' delta}`, `[T]`."""
        return {"lam": -(u * delta).sum(-1)}
