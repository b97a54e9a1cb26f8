"""What the inner solvers, the linear solvers and the implicit gradient need to know of a regulariser.

`R(delta) = 1/2 delta' Lambda delta` with `delta = phi - theta` and Lambda symmetric positive definite, the same for all
tasks. The inner problem of iMAML is `min_phi L(phi) + R(phi - theta)` (eq. 3-4 of the paper, Lambda = lambda I).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Proximal(Protocol):
    """A regulariser. `apply` and `solve` act on the last axis and take any leading axes."""

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 delta' Lambda delta`: `[T, P]` -> `[T]`."""
        ...

    def apply(self, v: Tensor) -> Tensor:
        """`Lambda v`: `[..., P]` -> `[..., P]`."""
        ...

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """`base + Lambda v`, in as few passes over them as Lambda allows."""
        ...

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`(Lambda + shift I)^-1 v`: `[..., P]` -> `[..., P]`, shift >= 0."""
        ...

    def diagonal(self) -> Tensor:
        """Lambda's diagonal, `[P]`; `[1]` where all of it is one number."""
        ...

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Gradient of the query loss with respect to Lambda's own parameters, by their names, a row per task.

        With `(H + Lambda) u = v` the solve behind the meta-gradient and `delta = phi - theta`, a change dLambda moves the
        minimiser by `-(H + Lambda)^-1 dLambda delta` and the query loss by `-u' dLambda delta`.
        """
        ...
