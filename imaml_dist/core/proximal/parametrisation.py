"""Unconstrained parameters behind each regulariser, so that an optimiser can step them and Lambda stays positive definite.

A positive number is stored as its logarithm, a positive definite factor as the lower triangle of its Cholesky factor with
the logarithm of the diagonal on the diagonal. A low-rank factor needs no constraint: `U U'` is positive semi-definite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imaml_dist.core.proximal.diagonal import DiagonalProximal, PerLayerProximal
from imaml_dist.core.proximal.kronecker import KroneckerProximal
from imaml_dist.core.proximal.low_rank import LowRankProximal
from imaml_dist.core.proximal.protocol import Proximal
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.vector import ParameterLayout

Kind = Literal["scalar", "per_layer", "diagonal", "low_rank", "kronecker"]

LARGEST_SIDE = 8192
"""Rows or columns of a weight that a Kronecker factor is made for: 256 MiB in float32."""

LOW_RANK_SHARE = 0.1
"""Squared norm of each column of the initial low-rank factor, in units of the initial strength. At zero the factor's
gradient vanishes and it would never move."""


@dataclass(frozen=True)
class Parametrisation:
    """The map from unconstrained parameters to a regulariser.

    Args:
        kind: shape of Lambda.
        layout: of the parameters it ties.
        rank: r >= 1, columns of the low-rank factor; used by `low_rank` alone.

    Raises:
        ValueError: `rank` < 1 or > P, or a weight too large for a Kronecker factor.

    Source: Pinheiro and Bates, "Unconstrained parametrizations for variance-covariance matrices" (1996), the log-Cholesky one.
    """

    kind: Kind
    layout: ParameterLayout
    rank: int = 1

    def __post_init__(self) -> None:
        if self.kind == "low_rank" and not 1 <= self.rank <= self.layout.size:
            raise ValueError(f"rank must be 1 to P = {self.layout.size}, got {self.rank}")
        for name, shape in self._weights() if self.kind == "kronecker" else ():
            if max(_sides(shape)) > LARGEST_SIDE:
                raise ValueError(
                    f"parameter {name!r} is a {_sides(shape)} matrix, too large for Kronecker factors (side <= {LARGEST_SIDE}); "
                    "use a diagonal or low-rank regulariser"
                )

    def initial(
        self, strength: float, dtype: torch.dtype = torch.float32, layers: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Unconstrained parameters of `Lambda = strength I` (for `low_rank` plus a small random part), on the CPU.

        Args:
            strength: > 0.
            dtype: of the result.
            layers: for `per_layer` and `diagonal`, other strengths > 0 by name of a parameter or a leading dotted part of names
                (`head` is that of `head.weight` and `head.bias`); of several that fit, the longest counts.

        Raises:
            ValueError: a strength is not a positive finite number, `layers` names nothing, parts of one layer (`per_layer`) are given
                different strengths, or the kind has none of its own for layers.
        """
        for given in (strength, *(layers or {}).values()):
            if not (given > 0 and math.isfinite(given)):
                raise ValueError(f"the initial strength must be a positive finite number, got {given}")
        if layers:
            return {"log_strengths": self._by_layer(strength, layers, dtype)}
        log = math.log(strength)
        if self.kind == "scalar":
            return {"log_strength": torch.full((), log, dtype=dtype)}
        if self.kind == "per_layer":
            return {"log_strengths": torch.full((len(set(self._layers())),), log, dtype=dtype)}
        if self.kind == "diagonal":
            return {"log_strengths": torch.full((self.layout.size,), log, dtype=dtype)}
        if self.kind == "low_rank":
            drawn = torch.randn(self.layout.size, self.rank, generator=torch.Generator().manual_seed(0), dtype=dtype)
            factor = drawn * math.sqrt(LOW_RANK_SHARE * strength / self.layout.size)
            return {"log_strengths": torch.full((self.layout.size,), log, dtype=dtype), "factor": factor}
        weights = dict(self._weights())
        raw = {}
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            if name in weights:
                m, n = _sides(weights[name])
                # L = strength^(1/4) I makes A = B = strength^(1/2) I.
                raw[f"{name}.left"] = torch.diag(torch.full((m,), log / 4, dtype=dtype))
                raw[f"{name}.right"] = torch.diag(torch.full((n,), log / 4, dtype=dtype))
            else:
                raw[f"{name}.log_strengths"] = torch.full((size,), log, dtype=dtype)
        return raw

    def build(self, raw: dict[str, Tensor]) -> Proximal:
        """The regulariser at unconstrained parameters `raw`."""
        natural = self._natural(raw)
        if self.kind == "scalar":
            return ScalarProximal(natural["lam"])
        if self.kind == "per_layer":
            return PerLayerProximal(natural["strengths"], self._layers(), self.layout.sizes)
        if self.kind == "diagonal":
            return DiagonalProximal(natural["strengths"])
        if self.kind == "low_rank":
            return LowRankProximal(natural["strengths"], natural["factor"])
        return KroneckerProximal(self.layout, natural)

    def pull_back(self, raw: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """`Proximal.gradient` rows, `[T, ...]`, -> rows with respect to the unconstrained parameters (the chain rule)."""
        vjp = torch.func.vjp(self._natural, {name: value.detach() for name, value in raw.items()})[1]
        (pulled,) = torch.func.vmap(vjp)(rows)
        return dict(pulled)

    def _natural(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.kind == "scalar":
            return {"lam": raw["log_strength"].exp()}
        if self.kind in ("per_layer", "diagonal"):
            return {"strengths": raw["log_strengths"].exp()}
        if self.kind == "low_rank":
            return {"strengths": raw["log_strengths"].exp(), "factor": raw["factor"]}
        return {
            name.replace("log_strengths", "strengths"): value.exp()
            if name.endswith(".log_strengths")
            else _positive_definite(value)
            for name, value in raw.items()
        }

    def _by_layer(self, strength: float, layers: Mapping[str, float], dtype: torch.dtype) -> Tensor:
        if self.kind not in ("per_layer", "diagonal"):
            raise ValueError(f"layers have strengths of their own with per_layer and diagonal, not with {self.kind}")
        names = self.layout.names
        for prefix in layers:
            if not any(_under(name, prefix) for name in names):
                raise ValueError(f"{prefix!r} names no parameter; there are {', '.join(names[:6])}, ...")
        own = [layers[max(found, key=len)] if (found := _fitting(name, layers)) else strength for name in names]
        if self.kind == "diagonal":
            logs = [
                torch.full((size,), math.log(s), dtype=dtype) for s, size in zip(own, self.layout.sizes, strict=True)
            ]
            return torch.cat(logs)
        by_layer: dict[int, float] = {}
        for name, layer, given in zip(names, self._layers(), own, strict=True):
            if by_layer.setdefault(layer, given) != given:
                raise ValueError(
                    f"{name!r} is given {given} and another part of its layer {by_layer[layer]}; name the whole layer, or take diagonal"
                )
        return torch.tensor([math.log(by_layer[layer]) for layer in range(len(by_layer))], dtype=dtype)

    def _weights(self) -> list[tuple[str, tuple[int, ...]]]:
        pairs = zip(self.layout.names, self.layout.shapes, strict=True)
        return [(name, shape) for name, shape in pairs if len(shape) >= 2]

    def _layers(self) -> tuple[int, ...]:
        """Number of the layer of each parameter: those under one dotted prefix belong together."""
        prefixes = [name.rpartition(".")[0] for name in self.layout.names]
        numbers = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefixes))}
        return tuple(numbers[prefix] for prefix in prefixes)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _fitting(name: str, prefixes: Mapping[str, float]) -> list[str]:
    return [prefix for prefix in prefixes if _under(name, prefix)]


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _positive_definite(raw: Tensor) -> Tensor:
    """`L L'` with `L = tril(raw, -1) + diag(exp(diag raw))`."""
    lower = raw.tril(-1) + torch.diag(raw.diagonal().exp())
    return lower @ lower.mT
