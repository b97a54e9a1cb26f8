"""The choices of a proximal strength, as a record: its shape, its initial value, and whether it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imaml_dist.core.proximal.parametrisation import Kind, Parametrisation
from imaml_dist.core.proximal.protocol import Proximal
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.vector import ParameterLayout


@dataclass(frozen=True)
class ProximalStrength:
    """Lambda.

    Attributes:
        kind: `scalar`, `per_layer`, `diagonal`, `low_rank` (plus diagonal) or `kronecker` (a matrix for every weight).
        init: initial strength > 0; Lambda begins as `init I`.
        learn: step it with the meta-parameters, by gradients from the same linear solve.
        lr: its outer learning rate; None is the model's. It steps logarithms, so 0.01 is about 1 % a step with Adam.
        rank: columns of `low_rank`'s factor.
        layers: other initial strengths of layers, by name or leading dotted part of names, of `per_layer` and `diagonal`: pairs
            such as `("head", 0.03)`.
    """

    kind: Kind = "scalar"
    init: float = 0.1
    learn: bool = False
    lr: float | None = None
    rank: int = 4
    layers: tuple[tuple[str, float], ...] = ()

    def parametrisation(self, layout: ParameterLayout) -> Parametrisation:
        """From unconstrained parameters to Lambda."""
        return Parametrisation(self.kind, layout, self.rank)

    def initial(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """Unconstrained parameters to begin with, on the CPU.

        Raises:
            ValueError: see `Parametrisation` and its `initial`.
        """
        return self.parametrisation(layout).initial(self.init, dtype, dict(self.layers))

    def build(self, layout: ParameterLayout, raw: dict[str, Tensor], like: Tensor) -> Proximal:
        """The regulariser at unconstrained parameters `raw`; at its initial value where it is not learned."""
        if raw:
            return self.parametrisation(layout).build(raw)
        return _initial(self, layout, like.dtype, like.device)


@lru_cache(maxsize=8)
def _initial(strength: ProximalStrength, layout: ParameterLayout, dtype: torch.dtype, device: torch.device) -> Proximal:
    if strength.kind == "scalar":
        return ScalarProximal(strength.init)
    raw = {name: value.to(device) for name, value in strength.initial(layout, dtype).items()}
    return strength.parametrisation(layout).build(raw)
