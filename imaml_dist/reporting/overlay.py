"""Learning curves of several runs over each other, by meta-steps and by seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from imaml_dist.reporting.drawing import (
    QUIET,
    STYLE,
    WIDTH,
    Floats,
    Records,
    finish,
    finite,
    new_axes,
    running_mean,
    series,
    thin,
)

COLOURS = ("#1f6f8b", "#b8561b", "#6aa583", "#8a6fa8", "#c0a030", "#c0392b", "#4a4a8a", "#7f8c8d", "#2c9c8f", "#a05a7a")
DASHES = ("-", "--", ":", "-.")

Over = Literal["meta-step", "seconds"]


@dataclass(frozen=True)
class Curve:
    """The records of one run and what it is called."""

    name: str
    records: Records


def look(number: int) -> dict[str, Any]:
    """Colour and dash of a run: forty that differ, then they come again."""
    return {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number // len(COLOURS) % len(DASHES)]}


@rc_context(STYLE)
def overlaid(curves: Sequence[Curve], over: Over, way: int | None) -> Figure:
    """Query accuracy on training tasks as running means, and validation as points.

    Args:
        curves: the runs, in the order of their looks.
        over: what lies along the axis: meta-steps, or the seconds that these took.
        way: N, if all runs have the same: chance is 1/N.
    """
    figure, axes = new_axes(WIDTH, 3.6, left=0.66, right=0.12, top=0.12)
    lowest = 1.0 if way is None else 1.0 / way
    for number, curve in enumerate(curves):
        style = look(number)
        steps, accuracy = series(curve.records, "query_accuracy")
        at = _along(curve.records, steps, over)
        mean = running_mean(accuracy, min(101, len(accuracy) // 20 * 2 + 1))
        axes.plot(thin(at), thin(mean), lw=1.5, label=curve.name, **style)
        steps, points = series(curve.records, "val_accuracy")
        axes.plot(
            _along(curve.records, steps, over),
            points,
            "o",
            ms=3.6,
            color=style["color"],
            mec="white",
            mew=0.5,
            zorder=4,
        )
        lowest = min([lowest, *mean.tolist(), *points.tolist()])
    if way is not None:
        axes.axhline(1.0 / way, color=QUIET, lw=0.9, ls=(0, (4, 3)))
    axes.set_ylim(max(0.0, lowest - 0.05), 1.02)
    finish(axes, "query accuracy", over)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(curves) <= len(COLOURS):
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.08), ncol=2, handlelength=1.6)
    return figure


def _along(records: Records, steps: Floats, over: Over) -> Floats:
    """Where steps lie: at themselves, or at the sum of the seconds up to their end."""
    if over == "meta-step":
        return steps
    taken = np.cumsum([finite(record.get("seconds_step")) or 0.0 for record in records])
    every = np.array([record["step"] for record in records], dtype=np.float64)
    return taken[np.searchsorted(every, steps)] if len(every) else steps
