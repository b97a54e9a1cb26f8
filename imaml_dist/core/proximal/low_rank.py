"""Low-rank plus diagonal regulariser: a strength for every parameter, and a few directions that are held more firmly."""

from __future__ import annotations

from dataclasses import dataclass

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
    matrices" (1950).
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
        """`(D + U U')^-1 v` with `D = diag(d) + shift I`, by the Woodbury identity: an r x r system.

        Its matrix `I + U'D^-1 U` has no eigenvalue below 1; one that comes out smaller, as with strengths far below nearly parallel
        columns, is rounding.
        """
        scaled = self.factor / (self.strengths + shift)[:, None]
        inner = torch.eye(self.factor.shape[1], dtype=v.dtype, device=v.device) + self.factor.mT @ scaled
        outside = v / (self.strengths + shift)
        (d,), (q,) = eigh(inner[None])
        correction: Tensor = ((v @ scaled @ q) / d.clamp(min=1.0)) @ q.mT
        return outside - correction @ scaled.mT

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
