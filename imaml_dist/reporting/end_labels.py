"""Names at the ends of curves, spread so that none lies over another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from imaml_dist.reporting.drawing import Floats

_SIZE, _LINE, _OUT, _WIDE = 7.0, 8.5, 11.0, 34.0
"""Points: the letters, from one name to the next above it, from an end to its name, and what end and name take along the axis."""


@dataclass(frozen=True)
class End:
    """The last point of a curve, and what stands beside it."""

    name: str
    x: float
    y: float
    colour: str


def name_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write the names to the right of their ends, each with a thin line to it; the axes must have their final size and scale.

    Args:
        axes: that the curves are drawn in.
        ends: the most important first: where more curves end side by side than names fit above each other, the last ones get none.
    """
    if not ends:
        return
    axes.autoscale_view()
    to_points = 72 / axes.figure.dpi
    places = axes.transData.transform([(end.x, end.y) for end in ends]) * to_points
    low, high = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1] * to_points
    room = int((high - low) // _LINE) + 1
    for group in _side_by_side(places[:, 0]):
        named = sorted(sorted(group)[:room], key=lambda n: float(places[n, 1]))
        for n, height in zip(named, spread(places[named, 1], _LINE, low, high), strict=True):
            axes.annotate(
                ends[n].name, (ends[n].x, ends[n].y), xytext=(_OUT, height - places[n, 1]), textcoords="offset points",
                va="center", fontsize=_SIZE, color=ends[n].colour, zorder=5,
                arrowprops={"arrowstyle": "-", "color": ends[n].colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
            )  # fmt: skip


def spread(at: Floats, apart: float, low: float, high: float) -> Floats:
    """The heights nearest to `at` (least squares) that are `apart` or more from each other and within `low` and `high`.

    With `h_i = at_i - i apart` the wanted heights are `g_i + i apart`, where `g` is the rising sequence nearest to `h`: neighbours that
    fall become one block, at their mean. Where a bound cuts `g` it stays the nearest within it.

    Args:
        at: rising, `[n]`, with `(n - 1) apart <= high - low`.
        apart: least distance.
        low, high: bounds.

    Returns:
        `[n]`, rising.
    """
    steps = apart * np.arange(len(at))
    blocks: list[tuple[float, int]] = []
    for height in (at - steps).tolist():
        mean, many = height, 1
        while blocks and blocks[-1][0] > mean:
            above, more = blocks.pop()
            mean, many = (mean * many + above * more) / (many + more), many + more
        blocks.append((mean, many))
    rising = np.repeat([mean for mean, _ in blocks], [many for _, many in blocks])
    return np.asarray(np.clip(rising, low, high - steps[-1]) + steps)


def _side_by_side(across: Floats) -> list[list[int]]:
    """Places in groups, each of which is too far from the others for names to meet."""
    order = np.argsort(across, kind="stable").tolist()
    groups = [[order[0]]]
    for before, after in pairwise(order):
        if across[after] - across[before] < _WIDE:
            groups[-1].append(after)
        else:
            groups.append([after])
    return groups
