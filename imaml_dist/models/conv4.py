"""Conv-4 in its two forms: that of the iMAML reference code for 28x28 images, and the pooled one for larger images."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from imaml_dist.models.activation import SHARPNESS, Activation
from imaml_dist.models.batch_norm_activation import BatchNormActivation2d

SMALLEST = 16
"""Pixels of a side that pooling in two four times leaves something of."""


class Conv4(nn.Module):
    """Four blocks that halve an image each, then one linear layer.

    Strided (28x28 only): blocks of [3x3 convolution, stride 2, padding 1; batch normalisation; activation]. 28 -> 14 -> 7 -> 4 -> 2.
    (The reference pads 7 to 8 at the bottom right first: a row of zeros where the padding of 1 has one already.) With 64 channels
    and one input channel it has 111,936 + 257 N parameters for N classes (113,221 at N = 5).

    Pooled: blocks of [3x3 convolution, padding 1; batch normalisation; activation; 2x2 maximum]. 84 -> 42 -> 21 -> 10 -> 5. With 32
    channels and three input channels it has 28,896 + 801 N parameters at 84x84 (32,901 at N = 5).

    Batch normalisation always uses the statistics of the batch it is given, in training and in testing, as in all
    published MAML and iMAML numbers; so the query images of an episode are classified together (transductively).
    Initialised as torch does by default.

    Args:
        image_shape: `(C, H, W)`, H and W at least 16.
        way: N, number of outputs.
        channels: feature maps per block.
        pooled: which form; None is the strided one for 28x28 images, and the pooled one for others.
        activation, softplus_beta: see `Activation`. Names and initial values of the parameters do not depend on them.

    Raises:
        ValueError: smaller images, or others than 28x28 in the strided form; what `Activation` refuses.

    Source: aravindr93/imaml_dev (strided form); Vinyals et al. (2016), Ravi and Larochelle (2017) (pooled form).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        way: int,
        channels: int = 64,
        pooled: bool | None = None,
        activation: str = "relu",
        softplus_beta: float = SHARPNESS,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        if pooled is None:
            pooled = (height, width) != (28, 28)
        if not pooled and (height, width) != (28, 28):
            raise ValueError(
                f"conv4 with pooled: false takes 28x28 images, got {height}x{width}; prepare the data at 28x28, or set model.pooled: true"
            )
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"conv4 takes images of {SMALLEST}x{SMALLEST} and more, got {height}x{width}; prepare larger ones"
            )
        widths = [colours, channels, channels, channels, channels]
        between = Activation(activation, softplus_beta)
        self.blocks = nn.ModuleList(_block(a, b, pooled, between) for a, b in pairwise(widths))
        left = (height // 16) * (width // 16) if pooled else 4
        self.head = nn.Linear(left * channels, way)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, C, H, W] -> [n, N]` logits."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def _block(inputs: int, outputs: int, pooled: bool, activation: Activation) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=1 if pooled else 2, padding=1)
    return nn.Sequential(
        convolution, BatchNormActivation2d(outputs, activation), *([nn.MaxPool2d(2)] if pooled else [])
    )
