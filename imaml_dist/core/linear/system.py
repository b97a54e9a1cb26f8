"""The system of the implicit gradient, `(C + Lambda + mu I) u = v`, with its parts in sight.

Most solvers only multiply with it, and it is itself a `Matvec`. Those that know more of its structure (Nystrom, the dual)
use its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.linear.solution import LinearSolution
from imaml_dist.core.proximal.protocol import Proximal


@dataclass(frozen=True)
class ProximalSystem:
    """`A_t = C_t + Lambda + mu I` for every task t.

    Attributes:
        curvature: C, products with the Hessian or the Gauss-Newton matrix of the support loss.
        proximal: Lambda.
        damping: mu >= 0, for stability only.
        precision: relative precision of the products with C, where it is coarser than the vectors' type (bfloat16 or TF32 factors
            in float32 results); None: as fine as the type.

    Raises:
        ValueError: `damping` < 0.

    Source: iMAML eq. 6-7, in the symmetric form that lets Lambda be any positive definite matrix.
    """

    curvature: Matvec
    proximal: Proximal
    damping: float = 0.0
    precision: float | None = None

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")

    def __call__(self, p: Tensor) -> Tensor:
        """`A p`: `[T, P]` -> `[T, P]`."""
        ap = self.proximal.add_to(self.curvature(p), p)
        return torch.add(ap, p, alpha=self.damping) if self.damping else ap

    def regulariser_solve(self, v: Tensor) -> Tensor:
        """`(Lambda + mu I)^-1 v`: `[..., P]` -> `[..., P]`."""
        return self.proximal.solve(v, self.damping)


Solve = Callable[[ProximalSystem, Tensor], LinearSolution]
"""A linear solver with its options bound: `(system, v) -> LinearSolution`."""
