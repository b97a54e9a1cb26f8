"""The proximal regulariser that ties task parameters phi to the meta-parameters theta.

`R(delta) = 1/2 delta' Lambda delta` with `delta = phi - theta`. The inner problem of iMAML is
`min_phi L(phi) + R(phi - theta)` (eq. 3-4 of the paper, Lambda = lambda I).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Proximal(Protocol):
    """What the inner solvers and the implicit gradient need to know of a regulariser."""

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 delta' Lambda delta`: `[T, P]` -> `[T]`."""
        ...

    def apply(self, v: Tensor) -> Tensor:
        """`Lambda v`: `[T, P]` -> `[T, P]`."""
        ...

    def gradient(self, u: Tensor, delta: Tensor) -> Tensor:
        """Gradient of the query loss with respect to Lambda's own parameters, one row per task."""
        ...


@dataclass(frozen=True)
class ScalarProximal:
    """`Lambda = lam I`.

    Args:
        lam: proximal strength lambda > 0, in units of loss per squared parameter.

    Raises:
        ValueError: `lam` is not a positive finite number.
    """

    lam: float

    def __post_init__(self) -> None:
        if not (self.lam > 0.0 and math.isfinite(self.lam)):
            raise ValueError(f"lam must be a positive finite number, got {self.lam}")

    def value(self, delta: Tensor) -> Tensor:
        """`lam/2 ||delta||^2`: `[T, P]` -> `[T]`."""
        return 0.5 * self.lam * (delta * delta).sum(-1)

    def apply(self, v: Tensor) -> Tensor:
        """`lam v`."""
        return self.lam * v

    def gradient(self, u: Tensor, delta: Tensor) -> Tensor:
        """`dF/dlam = -u' delta` per task, `[T]`, where `(H + lam I) u` is the query gradient.

        Follows from differentiating `grad L(phi) + lam (phi - theta) = 0` with respect to lam.
        """
        return -(u * delta).sum(-1)
