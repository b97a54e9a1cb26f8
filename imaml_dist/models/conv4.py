"""Conv-4 in the form of the iMAML reference code for 28x28 Omniglot images."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from imaml_dist.models.batch_norm_relu import BatchNormReLU2d


class Conv4(nn.Module):
    """Four blocks of [3x3 convolution, stride 2, padding 1; batch normalisation; ReLU], then one linear layer.

    28 -> 14 -> 7, padded by one row and column at the bottom right to 8, -> 4 -> 2. With 64 channels and one input
    channel it has 111,936 + 257 N parameters for N classes (113,221 at N = 5).

    Batch normalisation always uses the statistics of the batch it is given, in training and in testing, as in all
    published MAML and iMAML numbers on Omniglot; so the query images of an episode are classified together
    (transductively). Initialised as torch does by default.

    Args:
        image_shape: `(C, 28, 28)`.
        way: N, number of outputs.
        channels: feature maps per block.

    Raises:
        ValueError: an image shape other than `(C, 28, 28)`.

    Source: aravindr93/imaml_dev (network form); Vinyals et al. (2016).
    """

    def __init__(self, image_shape: tuple[int, int, int], way: int, channels: int = 64) -> None:
        super().__init__()
        if tuple(image_shape[1:]) != (28, 28):
            raise ValueError(
                f"conv4 takes 28x28 images, got {image_shape[1]}x{image_shape[2]}; prepare the data at 28x28"
            )
        widths = [image_shape[0], channels, channels, channels, channels]
        self.blocks = nn.ModuleList(_block(a, b) for a, b in pairwise(widths))
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.head = nn.Linear(4 * channels, way)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, C, 28, 28] -> [n, N]` logits."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 1:
                x = self.pad(x)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1),
        BatchNormReLU2d(outputs),
    )
