"""A multilayer perceptron over flattened images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from imaml_dist.models.activation import SHARPNESS, Activation


class MLP(nn.Module):
    """Linear layers with an activation between them; no normalisation, so samples do not depend on each other.

    Args:
        image_shape: `(C, H, W)`.
        way: N, number of outputs.
        hidden: width of each hidden layer.
        activation, softplus_beta: see `Activation`. Names and initial values of the parameters do not depend on them.

    Raises:
        ValueError: what `Activation` refuses.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        way: int,
        hidden: Sequence[int] = (256, 128),
        activation: str = "silu",
        softplus_beta: float = SHARPNESS,
    ) -> None:
        super().__init__()
        widths = [math.prod(image_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), Activation(activation, softplus_beta)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], way))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, C, H, W] -> [n, N]` logits."""
        return self.layers(x)  # type: ignore[no-any-return]
