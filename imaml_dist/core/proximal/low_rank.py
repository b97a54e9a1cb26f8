"""Low-rank plus diagonal regulariser: a strength for every parameter, and a few directions that are held more firmly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imaml_dist.core.eigen import eigh


@dataclass(frozen=True)
class LowRankProximal:
    """`Lambda = diag(d) + U U'`; a product costs `O(P r)`.

    Attributes:
        strengths: d, `[P]`, positive.
        factor: U, `[P, r]`.

    Source: iMAML's remark that lambda may be a matrix, in the form of a factor model; its inverse: Woodbury, "Inverting modified
    matrices" (1950), in an orthonormal basis.
    """

    strengths: Tensor
    factor: Tensor

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 (sum_i d_i delta_i^2 + ||U'delta||^2)`: `[T, P]` -> `[T]`."""
        return 0.5 * ((self.strengths * delta * delta).sum(-1) + ((delta @ self.factor) ** 2).sum(-1))

    def apply(self, v: Tensor) -> Tensor:
        """`d * v + U (U'v)`."""
        return self.strengths * v + (v @ self.factor) @ self.factor.mT

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """See `Proximal.add_to`."""
        return torch.addcmul(base, v, self.strengths) + (v @ self.factor) @ self.factor.mT

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`(D + U U')^-1 v` with `D = diag(d) + shift I`; `O(P r)` after `O(P r^2)` for a first v.

        With `D^-1/2 U = Q R`, Q orthonormal, it is `D^-1/2 (I - Q Q' + Q (I + R R')^-1 Q') D^-1/2 v`. So it stays positive definite where
        strengths are far below nearly parallel columns, and the smallest eigenvalues of the matrix that Woodbury's identity inverts, which
        are 1 at least, drown in the largest.
        """
        root, q, shrinks = self._basis(shift)
        w = v / root
        along = w @ q
        across = w - along @ q.mT
        across = across - (across @ q) @ q.mT  # what rounding left of the columns there
        return (across + (along * shrinks) @ q.mT) / root

    def _basis(self, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """`D^1/2`, the eigenvectors of `D^-1/2 U U' D^-1/2`, orthonormal `[P, r]`, and `1 / (1 + e)` of its eigenvalues e `[r]`."""
        if shift not in self._bases:
            root = (self.strengths + shift).sqrt()
            q, r = torch.linalg.qr(self.factor / root[:, None])
            (e,), (o,) = eigh((r @ r.mT)[None])
            self._bases[shift] = root, q @ o, 1.0 / (1.0 + e.clamp(min=0.0))
        return self._bases[shift]

    @cached_property
    def _bases(self) -> dict[float, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def diagonal(self) -> Tensor:
        """`d + rowwise ||U||^2`, `[P]`."""
        return self.strengths + (self.factor**2).sum(-1)

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """`{"strengths": -u * delta, "factor": -(u (delta'U) + delta (u'U))}`, `[T, P]` and `[T, P, r]`."""
        along_delta, along_u = (delta @ self.factor)[..., None, :], (u @ self.factor)[..., None, :]
        return {
            "strengths": -u * delta,
            "factor": -(u[..., None] * along_delta + delta[..., None] * along_u),
        }
