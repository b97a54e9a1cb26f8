"""Kronecker regulariser ("matrix" lambda): a full matrix for every weight, as the product of a left and a right factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imaml_dist.core.eigen import eigh
from imaml_dist.core.vector import ParameterLayout


@dataclass(frozen=True)
class KroneckerProximal:
    """Block-diagonal over parameters: `A kron B` for a weight seen as an m x n matrix W, a diagonal for a bias.

    A weight of more than two axes is seen as `[first axis, all others]`. The block acts as `W -> A W B`; it costs
    `m^2 + n^2` numbers instead of `(m n)^2`.

    Attributes:
        layout: names and shapes of the parameters.
        factors: for a weight `NAME` of two axes or more `NAME.left` = A `[m, m]` and `NAME.right` = B `[n, n]`, symmetric
            positive definite; for any other parameter `NAME.strengths` `[size]`, positive.

    Source: iMAML's remark that lambda may be a matrix, in the form that Martens and Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature" (2015), give a layer's curvature; the shifted inverse by eigenvectors: George et
    al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis" (2018).
    """

    layout: ParameterLayout
    factors: Mapping[str, Tensor]

    def value(self, delta: Tensor) -> Tensor:
        """`1/2 sum <W, A W B>` over the blocks of delta: `[T, P]` -> `[T]`."""
        return 0.5 * (delta * self.apply(delta)).sum(-1)

    def apply(self, v: Tensor) -> Tensor:
        """`A W B` block by block."""
        parts = []
        for name, part in self._blocks(v):
            if self._is_matrix(name):
                part = self.factors[f"{name}.left"] @ part @ self.factors[f"{name}.right"]
            else:
                part = self.factors[f"{name}.strengths"] * part
            parts.append(part.reshape(*v.shape[:-1], -1))
        return torch.cat(parts, dim=-1)

    def add_to(self, base: Tensor, v: Tensor) -> Tensor:
        """See `Proximal.add_to`."""
        return base + self.apply(v)

    def solve(self, v: Tensor, shift: float = 0.0) -> Tensor:
        """`(A kron B + shift I)^-1` block by block, from the eigenvectors of A and B.

        In them the block is diagonal: `W -> Qa [(Qa' W Qb) / (a_i b_j + shift)] Qb'`.
        """
        parts = []
        for name, part in self._blocks(v):
            if self._is_matrix(name):
                (a, qa), (b, qb) = self._spectra[f"{name}.left"], self._spectra[f"{name}.right"]
                part = qa @ ((qa.mT @ part @ qb) / (a[:, None] * b + shift)) @ qb.mT
            else:
                part = part / (self.factors[f"{name}.strengths"] + shift)
            parts.append(part.reshape(*v.shape[:-1], -1))
        return torch.cat(parts, dim=-1)

    def diagonal(self) -> Tensor:
        """`A_ii B_jj` for every entry of every weight, `[P]`."""
        parts = []
        for name in self.layout.names:
            if self._is_matrix(name):
                left, right = self.factors[f"{name}.left"].diagonal(), self.factors[f"{name}.right"].diagonal()
                parts.append((left[:, None] * right).reshape(-1))
            else:
                parts.append(self.factors[f"{name}.strengths"])
        return torch.cat(parts)

    def gradient(self, u: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Symmetric rows by the names of `factors`: `dA = -sym(U B D')`, `dB = -sym(U' A D)` with U, D blocks of u, delta."""
        rows = {}
        for (name, left), (_, right) in zip(self._blocks(u), self._blocks(delta), strict=True):
            if self._is_matrix(name):
                a, b = self.factors[f"{name}.left"], self.factors[f"{name}.right"]
                rows[f"{name}.left"] = -_symmetric(left @ b @ right.mT)
                rows[f"{name}.right"] = -_symmetric(left.mT @ a @ right)
            else:
                rows[f"{name}.strengths"] = -left * right
        return rows

    def _is_matrix(self, name: str) -> bool:
        return f"{name}.left" in self.factors

    def _blocks(self, v: Tensor) -> list[tuple[str, Tensor]]:
        """Every parameter's part of v: `[..., m, n]` for a weight, `[..., size]` for the others."""
        blocks = []
        for name, part in zip(self.layout.names, torch.split(v, list(self.layout.sizes), dim=-1), strict=True):
            if self._is_matrix(name):
                part = part.reshape(*v.shape[:-1], self.factors[f"{name}.left"].shape[0], -1)
            blocks.append((name, part))
        return blocks

    @cached_property
    def _spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: _spectrum(factor) for name, factor in self.factors.items() if not name.endswith(".strengths")}


def _spectrum(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a positive definite factor; what rounding makes of the smallest stays positive."""
    (d,), (q,) = eigh(factor[None])
    return torch.maximum(d, torch.finfo(d.dtype).eps * d[-1]), q


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
