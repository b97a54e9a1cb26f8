"""Diagonal regularisers: a proximal strength for every parameter ("vector" lambda), or one for every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalProximal:
    """`Lambda = diag(d)`.

    Attributes:
        strengths: d, `[P]`, positive.

    Source: iMAML's remark that lambda may be a vector or a matrix.
    """

    strengths: Tensor

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 sum_i d_i delta_i^2`: `[T, P]` -> `[T]`."""
        return 0.5 * (self.strengths * delta * delta).sum(-1)

    def apply(self, v: Tensor) -> Tensor:
        """`d * v`."""
        return self.strengths * v

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """See `Proximal.add_to`."""
        return torch.addcmul(base, v, self.strengths)

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`v / (d + shift)`."""
        return v / (self.strengths + shift)

    def diagonal(self) -> Tensor:
        """d, `[P]`."""
        return self.strengths

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """`{"strengths": -u * delta}`, `[T, P]`."""
        return {"strengths": -u * delta}


@dataclass(frozen=True)
class PerLayerProximal:
    """`Lambda = diag(d)` with one value for all parameters of a layer.

    Attributes:
        strengths: `[L]`, positive, one per layer.
        layers: the layer of each named parameter, 0..L-1, in the order of the flat vector.
        sizes: number of entries of each named parameter; they add up to P.

    Source: as `DiagonalProximal`, with the entries of a layer tied, as its learning rates are in Antoniou, Edwards and Storkey,
    "How to train your MAML" (2019).
    """

    strengths: Tensor
    layers: tuple[int, ...]
    sizes: tuple[int, ...]

    def _spread(self) -> DiagonalProximal:
        return DiagonalProximal(torch.cat([self.strengths[n].expand(s) for n, s in self._places()]))

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 sum_l d_l ||delta_l||^2`: `[T, P]` -> `[T]`."""
        return self._spread().value(delta)

    def apply(self, v: Tensor) -> Tensor:
        """`d * v`."""
        return self._spread().apply(v)

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """See `Proximal.add_to`."""
        return self._spread().add_to(base, v)

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`v / (d + shift)`."""
        return self._spread().solve(v, shift)

    def diagonal(self) -> Tensor:
        """d for every parameter, `[P]`."""
        return self._spread().strengths

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """`{"strengths": -u_l' delta_l}`, `[T, L]`."""
        parts = torch.split(u * delta, list(self.sizes), dim=-1)
        rows = u.new_zeros(*u.shape[:-1], len(self.strengths))
        for (layer, _), part in zip(self._places(), parts, strict=True):
            rows[..., layer] -= part.sum(-1)
        return {"strengths": rows}

    def _places(self) -> list[tuple[int, int]]:
        return list(zip(self.layers, self.sizes, strict=True))
