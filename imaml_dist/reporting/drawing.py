"""What all figures share: palette, style, thinning of long curves, and an SVG text that is the same every time."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

Records = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]

INK, QUIET, RULE, TRAINED, UNTRAINED, MARK = "#1f2733", "#67717e", "#d9dde2", "#1f6f8b", "#a3abb5", "#b8561b"
WIDTH = 9.2
"""Inches, the full width of the page."""
MAX_POINTS = 800
STYLE: Any = {  # the key type is one huge Literal that differs between versions of matplotlib
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.usetex": False,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.01,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def finite(value: object) -> float | None:
    """A finite number as float, anything else as None."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def series(records: Records, key: str) -> tuple[Floats, Floats]:
    """Steps and values of the records that have a finite number under `key`."""
    pairs = [(r["step"], value) for r in records if (value := finite(r.get(key))) is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def thin(values: Floats, limit: int = MAX_POINTS) -> Floats:
    """At most `limit` values: the means of runs of neighbours of one length."""
    stride = -(-len(values) // limit)
    if stride <= 1:
        return values
    starts = np.arange(0, len(values), stride)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def running_mean(values: Floats, window: int) -> Floats:
    """Centred mean over `window` values; towards the ends the window shrinks on both sides, so that it does not lag."""
    at = np.arange(len(values))
    half = np.clip(np.minimum(at, at[::-1]), window // 8, window // 2)
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def svg(figure: Figure, prefix: str) -> str:
    """The figure as one `<svg>` element that can share a page with others: `prefix` makes its ids unique."""
    text = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({**STYLE, "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that our font lacks is drawn by the reader's own font
        figure.savefig(text, format="svg", metadata=nothing)
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<!--.*?-->\s*|<style.*?</style>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href=", "href=")
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    # a height would give the aspect ratio in place of the viewBox, and is rounded
    width = round(float(figure.get_size_inches()[0]) * 100)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", body[: body.index(">")])
    return f'{opening} width="{width}"{body[body.index(">") :]}'.rstrip()


def new_axes(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float = 0.5
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes and margins in inches."""
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes(box)


def noisy_line(axes: Axes, steps: Floats, values: Floats, name: str = "") -> None:
    """Every value thin and pale, their running mean above."""
    window = min(101, len(values) // 20 * 2 + 1)
    pale: dict[str, Any] = {"alpha": 0.8, "marker": "."} if len(values) <= 30 else {"alpha": 0.4}
    axes.plot(thin(steps), thin(values), color=TRAINED, lw=0.7, label=name or None, **pale)
    if window > 1:
        label = f"running mean over {window} steps" if name else None
        axes.plot(thin(steps), thin(running_mean(values, window)), color=TRAINED, lw=1.7, label=label)


def finish(axes: Axes, what: str, over: str = "meta-step") -> None:
    """Labels and ticks, the last touch of every figure with axes."""
    axes.set_ylabel(what)
    axes.set_xlabel(over)
    axes.tick_params(length=2.5, width=0.6)
    if over == "meta-step":
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))


def log_scale(axes: Axes, subs: Sequence[float]) -> None:
    """A logarithmic vertical axis with plain numbers at `subs` times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
