"""A few-shot image data set that needs no download: glyphs of the fonts in the matplotlib wheel.

One class is one code point, one image is that code point drawn by one font and slightly bent. Whole alphabets
are held out. With the fonts of matplotlib 3.11 there are 1298 training classes (Latin, Greek, symbols),
98 of validation (Georgian) and 152 of test (Cyrillic, Armenian, Lao), whatever the seed.
"""

from __future__ import annotations

import importlib.util
import math
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from imaml_dist.data.records import ClassRecord, Images
from imaml_dist.errors import DataError, InputError

GLYPH_NAME = "glyphs"

# Letters go by the first word of their Unicode name. Greek trains with Latin, the two share too many shapes.
# Modifier, mathematical and full-width letters are absent: they repeat Latin and Greek.
SCRIPTS = {"train": ("LATIN", "GREEK"), "val": ("GEORGIAN",), "test": ("CYRILLIC", "ARMENIAN", "LAO")}
# All else goes by block, and trains. Box drawing, block elements and Braille are absent: what tells them
# apart is the place in the cell, and centring takes it away.
TRAIN_BLOCKS = (
    (0x0021, 0x00FF, "Basic"),
    (0x2010, 0x205E, "Punctuation"),
    (0x20A0, 0x218F, "Letterlike"),
    (0x2190, 0x21FF, "Arrows"),
    (0x2200, 0x22FF, "Mathematical"),
    (0x2300, 0x23FF, "Technical"),
    (0x25A0, 0x25FF, "Geometric"),
    (0x2600, 0x27FF, "Pictures"),
    (0x2900, 0x2BFF, "Supplement"),
)
SKIPPED_FONTS = ("LastResortHE", "cm", "STIXNonUni", "STIXSiz")  # wrong, private or placeholder code points

MIN_FONTS = 8  # that a code point needs
ALIKE = 0.10  # see _close: two code points closer than this look alike
SAME = 0.02  # fonts closer than this draw a code point as one picture

SIDE = 28  # of an image, pixels
BOX = 20  # longer side of the ink before bending, pixels
OVER = 2  # bending happens at this multiple of the resolution
EM = 80  # size at which fonts draw, pixels; well above BOX * OVER, so that few glyphs are enlarged
MIN_INK = 16  # of EM; smaller glyphs (dots, commas, accents) are blobs once enlarged
ROTATION = math.radians(8.0)
SCALE = (0.85, 1.10)
SHEAR = 0.10
SHIFT = 1.5  # pixels

Queue = dict[int, tuple[str, str]]  # from code point to script or block, and split
Drawings = dict[str, Image.Image]  # of one code point, by stem of the font


class _Font(NamedTuple):
    stem: str
    draw: ImageFont.FreeTypeFont
    code_points: frozenset[int]


def glyph_splits(
    seed: int = 0, images_per_class: int = 20, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[ClassRecord]]:
    """Draw the whole data set.

    Code points that MIN_FONTS fonts can draw and that the tables above place in a split queue up: training,
    validation, test, each by number. A font is taken from a code point if it draws it nearly like one further
    up that kept this font. Losing over half of its fonts drops a code point, and so does an average over its
    fonts nearly like that of a class of another split. What is left is a class.

    An image is the ink of the glyph, 20 pixels on its longer side and centred, then rotated by up to 8
    degrees either way, scaled by 0.85 to 1.1, sheared by up to 0.1 and shifted by up to 1.5 pixels, all
    uniformly at random, never out of the image. Fonts come in random order, over again once all were used; of
    fonts that draw one picture only one counts. Equal arguments give equal bytes on one machine. The classes
    do not depend on the seed, and fewer `images_per_class` are the first ones of more.

    Args:
        seed: of all random numbers, 0 to 2**64 - 1.
        images_per_class: number of images in every class, at least 1.
        progress: called as `progress(done, total)` after each class, in numbers of classes.

    Returns:
        For `"train"`, `"val"` and `"test"` the classes by ascending key: script or block, `/` and code point
        in five hexadecimal digits, unique over all splits. Images are uint8 `[images_per_class, 28, 28, 1]`,
        ink 255 on 0; `sources` has the font of each.

    Raises:
        InputError: `seed` or `images_per_class` is out of its range.
        DataError: the fonts of matplotlib, or fontTools to read them, are not installed.
    """
    if not 0 <= seed < 2**64 or images_per_class < 1:
        given = f"seed is {seed} and images_per_class is {images_per_class}"
        raise InputError(f"glyphs: {given}; choose them from 0 to 2**64 - 1 and from 1 up.")
    queue = _candidates(fonts := _load_fonts())
    classes = _distinct(_draw_all(fonts, queue), queue)
    splits: dict[str, list[ClassRecord]] = {split: [] for split in SCRIPTS}
    for done, (code_point, drawings) in enumerate(classes.items(), start=1):
        script, split = queue[code_point]
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, code_point], dtype=np.uint64)))
        images, sources = _sample(drawings, images_per_class, rng)
        key, name = f"{script}/{code_point:05X}", unicodedata.name(chr(code_point))
        splits[split].append(ClassRecord(key, images, name, sources))
        if progress is not None:
            progress(done, len(classes))
    return {split: sorted(records, key=lambda record: record.key) for split, records in splits.items()}


def _load_fonts() -> list[_Font]:
    # find_spec only locates a package; importing matplotlib would be slow.
    spec = importlib.util.find_spec("matplotlib")
    roots = (spec.submodule_search_locations if spec is not None else None) or ()
    paths = sorted(path for root in roots for path in Path(root, "mpl-data", "fonts", "ttf").glob("*.ttf"))
    paths = [path for path in paths if not path.name.startswith(SKIPPED_FONTS)]
    if not paths or importlib.util.find_spec("fontTools") is None:
        missing = "the package fontTools" if paths else "mpl-data/fonts/ttf in the package matplotlib"
        raise DataError(f"glyphs: {missing} is missing; run pip install matplotlib, which brings it.")
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped, unused-ignore]

    fonts = []
    for path in paths:
        with TTFont(path, lazy=True) as table:
            code_points = frozenset(cp for cp, glyph in table.getBestCmap().items() if glyph != ".notdef")
        # The other engine, Raqm, shapes text with whatever version the system has.
        draw = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
        fonts.append(_Font(path.stem, draw, code_points))
    return fonts


def _group(code_point: int) -> tuple[str, str] | None:
    """Script or block of a code point, and its split; None if it takes no part."""
    category = unicodedata.category(chr(code_point))[0]
    if category in "MCZ":  # marks; controls, formats and private use; separators
        return None
    word = unicodedata.name(chr(code_point)).split(" ")[0]
    for split, words in SCRIPTS.items():
        if category == "L" and word in words:
            return word.capitalize(), split
    blocks = (name for first, last, name in TRAIN_BLOCKS if first <= code_point <= last)
    return next(((name, "train") for name in blocks), None)


def _candidates(fonts: list[_Font]) -> Queue:
    known = sorted({cp for font in fonts for cp in font.code_points})
    groups = ((cp, group) for cp in known if (group := _group(cp)) is not None)
    return dict(sorted(groups, key=lambda item: list(SCRIPTS).index(item[1][1])))


def _draw(font: _Font, code_point: int) -> Image.Image | None:
    """The ink of a glyph, centred, at OVER times the final resolution; None if there is next to none."""
    side = 3 * EM
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((EM, 2 * EM), chr(code_point), fill=255, font=font.draw, anchor="ls")
    ink = canvas.getbbox()
    if ink is None or min(ink) == 0 or max(ink) == side:  # blank, or cut off by the canvas
        return None
    width, height = ink[2] - ink[0], ink[3] - ink[1]
    if max(width, height) < MIN_INK:
        return None
    zoom = BOX * OVER / max(width, height)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    image = Image.new("L", (SIDE * OVER, SIDE * OVER))
    corner = (SIDE * OVER - size[0]) // 2, (SIDE * OVER - size[1]) // 2
    image.paste(canvas.resize(size, Image.Resampling.BICUBIC, box=ink), corner)
    return image


def _draw_all(fonts: list[_Font], queue: Queue) -> dict[int, Drawings]:
    """The drawings of the code points that enough fonts really draw, in the order of the queue."""
    found: dict[int, Drawings] = {cp: {} for cp in queue}
    for font in fonts:
        box = _draw(font, 0x10FFFF)  # never a character, so this is the picture for "not in this font"
        missing = box.tobytes() if box is not None else b""
        for code_point in font.code_points & queue.keys():
            image = _draw(font, code_point)
            if image is not None and image.tobytes() != missing:
                found[code_point][font.stem] = image
    return {cp: drawings for cp, drawings in found.items() if len(drawings) >= MIN_FONTS}


def _features(images: Iterable[Image.Image]) -> NDArray[np.uint8]:
    # The blur forgives strokes a fraction of a pixel wider or further left.
    blurred = [image.reduce(OVER).filter(ImageFilter.GaussianBlur(1.0)) for image in images]
    return np.stack([np.asarray(image).reshape(-1) for image in blurred])


def _close(features: NDArray[np.uint8], limit: float) -> list[list[int]]:
    """Pairs [earlier, later] of rows with a squared distance below limit times the smaller squared length."""
    # Halved, sums of products stay below 2**24, where float32 is exact: no BLAS changes what looks alike.
    rows = (features // 2).astype(np.float32)
    products = rows @ rows.T
    squares = np.diagonal(products)
    distances = squares[:, None] + squares - 2 * products
    near = np.triu(distances < limit * np.minimum(squares[:, None], squares), 1)
    return list(np.argwhere(near).tolist())


def _distinct(found: dict[int, Drawings], queue: Queue) -> dict[int, Drawings]:
    """For every class the drawings left: no look-alikes, no picture twice."""
    within: dict[int, list[tuple[str, int]]] = {cp: [] for cp in found}
    for stem in sorted({stem for drawings in found.values() for stem in drawings}):
        having = [cp for cp in found if stem in found[cp]]
        for earlier, later in _close(_features(found[cp][stem] for cp in having), ALIKE):
            within[having[later]].append((stem, having[earlier]))
    across: dict[int, list[int]] = {cp: [] for cp in found}
    having = list(found)
    means = np.stack([_features(drawings.values()).mean(axis=0) for drawings in found.values()])
    for earlier, later in _close(means.astype(np.uint8), ALIKE):
        if queue[having[earlier]][1] != queue[having[later]][1]:
            across[having[later]].append(having[earlier])
    kept: dict[int, Drawings] = {}
    for cp, drawings in found.items():
        lost = {stem for stem, earlier in within[cp] if stem in kept.get(earlier, ())}
        if 2 * len(lost) <= len(drawings) and not any(earlier in kept for earlier in across[cp]):
            kept[cp] = {stem: image for stem, image in drawings.items() if stem not in lost}
    return {cp: _without_repetitions(drawings) for cp, drawings in kept.items()}


def _without_repetitions(drawings: Drawings) -> Drawings:
    repeats = {later for _, later in _close(_features(drawings.values()), SAME)}
    return {stem: drawings[stem] for index, stem in enumerate(drawings) if index not in repeats}


def _sample(drawings: Drawings, count: int, rng: np.random.Generator) -> tuple[Images, tuple[str, ...]]:
    # argsort of uniforms and not rng.permutation, whose algorithm may change with numpy.
    order = np.argsort(rng.random(len(drawings)), kind="stable").tolist()
    sources = tuple(list(drawings)[order[i % len(order)]] for i in range(count))
    return np.stack([_bend(drawings[stem], rng.random(5)) for stem in sources]), sources


def _bend(image: Image.Image, uniforms: NDArray[np.float64]) -> Images:
    """One image `[28, 28, 1]`; uniforms in [0, 1) set angle, scale, shear and the two shifts."""
    signed = 2 * uniforms - 1
    angle, scale = ROTATION * signed[0], SCALE[0] + (SCALE[1] - SCALE[0]) * uniforms[1]
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, SHEAR * signed[2]], [0.0, 1.0]])
    # A shift that would push a corner of the bent box out of the image is cut short.
    room = np.minimum(SHIFT, SIDE / 2 - BOX / 2 * np.abs(matrix).sum(axis=1))
    # Pillow wants the way back: from a point of the result to the point of the drawing that lands there.
    back, centre = np.linalg.inv(matrix), SIDE * OVER / 2
    start = centre - back @ (centre + OVER * room * signed[3:])
    data = np.column_stack([back, start]).reshape(-1).tolist()
    bent = image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    return np.asarray(bent.reduce(OVER))[:, :, None]
