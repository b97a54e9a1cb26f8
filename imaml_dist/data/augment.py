"""Augmentation whose every draw belongs to one image: a pure function of (seed, step, task, image).

Image i of an episode, in order of classes as drawn and within a class of images as drawn (support first), takes the
words of the stream (seed, AUGMENTATION, step, task, ordinal i + 1). u = (word >> 11) / 2^53 lies in [0, 1). Every
operation has a word of its own, read or not, so that switching one on leaves the draws of the others alone. They are
applied in this order:

    word 0      flip             left and right change sides if u < 1/2
         1      vertical flip    top and bottom change sides if u < 1/2
         2      quarter turns    floor(4 u) of them, counter-clockwise
         3, 4   crop             shift by floor((2 c + 1) u) - c pixels down and right, c = crop; zeros move in
         5      rotate           counter-clockwise by r (2 u - 1) degrees about the centre, r = rotate; bilinear,
                                 zeros from outside
         6      brightness       x <- f x                      f = 1 + c (2 u - 1), c = colour, of each of the three
         7      contrast         x <- m + f (x - m)            m: mean of the image
         8      saturation       x <- g + f (x - g)            g = 0.299 R + 0.587 G + 0.114 B; three channels only
         9-11   (unused)

Zero is empty paper in data stored as ink, and black elsewhere. Rotation and colour compute in float32 and end, each,
with rounding to the nearest of 0 .. 255 (half to even). A draw that means nothing gives the very same pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from imaml_dist.data.philox import Domain, raw_words
from imaml_dist.data.records import Images
from imaml_dist.errors import ConfigError

WORDS = 12
"""Of every image: three whole blocks of the generator."""

Draws = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; nothing by default.

    Attributes:
        flip: left to right, of one image in two.
        vertical_flip: top to bottom, of one image in two.
        quarter_turns: 0 to 3 of them; square images only.
        crop: largest shift in pixels each way, 0 <= crop < side.
        rotate: largest angle in degrees each way, 0 to 180.
        colour: largest change of brightness, contrast and saturation, as a share, 0 to 1.
    """

    flip: bool = False
    vertical_flip: bool = False
    quarter_turns: bool = False
    crop: int = 0
    rotate: float = 0.0
    colour: float = 0.0

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Refuse what images of `(C, H, W)` cannot undergo.

        Raises:
            ConfigError: quarter turns of images that are not square, or a shift as large as a side.
        """
        _, height, width = image_shape
        if self.quarter_turns and height != width:
            raise ConfigError(
                f"data.augment.quarter_turns: true given, but the images are {height} x {width}; only square ones can be turned"
            )
        if not 0 <= self.crop < min(height, width):
            raise ConfigError(
                f"data.augment.crop: {self.crop} given, but the images are {height} x {width}; "
                f"choose 0 to {min(height, width) - 1}"
            )


def image_draws(seed: int, step: int, task: int, images: int) -> Draws:
    """u of every word of every image of an episode, `[images, WORDS]` in [0, 1)."""
    words = np.empty((images, WORDS), dtype=np.uint64)
    for i in range(images):
        words[i] = raw_words(seed, Domain.AUGMENTATION, step, task, i + 1, WORDS)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmented(images: Images, u: Draws, how: Augmentation) -> Images:
    """Every image changed by its own draws.

    Args:
        images: uint8 `[n, H, W, C]`, left as they are.
        u: `[n, WORDS]` in [0, 1), of `image_draws`.
        how: what may happen; checked by `Augmentation.check`.
    """
    if how.flip:
        images = np.where(_per_image(u[:, 0] < 0.5), images[:, :, ::-1], images)
    if how.vertical_flip:
        images = np.where(_per_image(u[:, 1] < 0.5), images[:, ::-1], images)
    if how.quarter_turns:
        images = _turned(images, np.floor(4 * u[:, 2]))
    if how.crop:
        images = _shifted(images, np.floor((2 * how.crop + 1) * u[:, 3:5]).astype(np.intp) - how.crop, how.crop)
    if how.rotate:
        images = _rotated(images, how.rotate * (2 * u[:, 5] - 1))
    if how.colour:
        images = _recoloured(images, 1 + how.colour * (2 * u[:, 6:9] - 1))
    return images


def _per_image(values: NDArray[Any]) -> NDArray[Any]:
    return values[:, None, None, None]


def _turned(images: Images, turns: Draws) -> Images:
    turned = images.copy()
    for k in (1, 2, 3):
        turned[turns == k] = np.rot90(images[turns == k], k, axes=(1, 2))
    return turned


def _shifted(images: Images, by: NDArray[np.intp], most: int) -> Images:
    """Moved by `[n, 2]` pixels down and right: the window of a padded image that lies as far up and left."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = (most - by).T
    return np.moveaxis(windows[np.arange(count), down, right], 1, -1)


def _rotated(images: Images, degrees: Draws) -> Images:
    """Pixel (y, x) of the result is what lies, turned back by the angle about the centre, between four pixels."""
    count, height, width, _ = images.shape
    # By the C library one by one: NumPy's own sine differs between processors.
    radians = [math.radians(angle) for angle in degrees]
    cos = np.array([math.cos(r) for r in radians], dtype=np.float32)[:, None, None]
    sin = np.array([math.sin(r) for r in radians], dtype=np.float32)[:, None, None]
    middle_y, middle_x = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
    y = (np.arange(height, dtype=np.float32) - middle_y)[None, :, None]
    x = (np.arange(width, dtype=np.float32) - middle_x)[None, None, :]
    from_y, from_x = cos * y + sin * x + middle_y, cos * x - sin * y + middle_x
    top, left = np.floor(from_y), np.floor(from_x)
    lower, righter = (from_y - top)[..., None], (from_x - left)[..., None]
    # Two rows and columns of zeros on every side, in which all that lies outside is found with its neighbour.
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    _, rows, columns, channels = padded.shape
    row, column = (np.clip(v + 2, 0, size - 2).astype(np.intp) for v, size in ((top, rows), (left, columns)))
    first = (np.arange(count)[:, None, None] * rows + row) * columns + column
    pixels = padded.reshape(-1, channels)
    one, right, below, across = (
        pixels.take(first + away, axis=0).astype(np.float32) for away in (0, 1, columns, columns + 1)
    )
    upper_row, lower_row = one + righter * (right - one), below + righter * (across - below)
    return _rounded(upper_row + lower * (lower_row - upper_row))


def _recoloured(images: Images, factors: Draws) -> Images:
    brightness, contrast, saturation = (_per_image(f) for f in factors.astype(np.float32).T)
    mean = brightness * _per_image(images.reshape(len(images), -1).mean(1, dtype=np.float64).astype(np.float32))
    x = mean + contrast * (images * brightness - mean)
    if images.shape[-1] == 3:
        red, green, blue = np.moveaxis(x, -1, 0)
        grey = (np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue)[..., None]
        x = grey + saturation * (x - grey)
    return _rounded(x)


def _rounded(x: NDArray[Any]) -> Images:
    rounded: Images = np.clip(np.rint(x), 0, 255).astype(np.uint8)
    return rounded
