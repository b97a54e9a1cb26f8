"""The figure of what the algorithm itself learns, such as a proximal strength or inner rates, over meta-steps.

Records carry `algorithm_<name>_min`, `_median` and `_max` for every such parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from imaml_dist.reporting.drawing import (
    MARK,
    STYLE,
    TRAINED,
    WIDTH,
    Floats,
    Records,
    finish,
    finite,
    log_scale,
    new_axes,
    thin,
)

COLOURS = (TRAINED, MARK, "#6aa583", "#8a6fa8", "#c0392b", "#a9bcc8", "#e0a458", "#1f2733")
"""One a parameter; so many are drawn at most."""

_KEY = re.compile(r"algorithm_(.+)_median\Z")


@dataclass(frozen=True)
class Learned:
    """One parameter over meta-steps `[n]`: the smallest, median and largest of its entries."""

    name: str
    steps: Floats
    low: Floats
    median: Floats
    high: Floats


def read_learned(records: Records) -> list[Learned]:
    """Every parameter that the records tell of, in the order in which they first do."""
    names = dict.fromkeys(match.group(1) for record in records for key in record if (match := _KEY.match(key)))
    found = []
    for name in names:
        keys = [f"algorithm_{name}_{which}" for which in ("min", "median", "max")]
        rows = [[record["step"], *(finite(record.get(key)) for key in keys)] for record in records]
        table = np.array([row for row in rows if None not in row], dtype=np.float64)
        if len(table):
            found.append(Learned(name, *table.T))
    return found


@rc_context(STYLE)
def learned_curves(learned: list[Learned]) -> Figure:
    """Medians as lines, the span of a parameter's entries as a band; on a log scale where all is positive.

    Args:
        learned: at least one; the first `len(COLOURS)` are drawn.
    """
    figure, axes = new_axes(WIDTH, 2.6, left=0.66, right=0.12, top=0.4)
    drawn = learned[: len(COLOURS)]
    for one, colour in zip(drawn, COLOURS, strict=False):
        at = thin(one.steps)
        marker = "." if len(at) == 1 else ""
        axes.plot(at, thin(one.median), color=colour, lw=1.5, label=one.name, marker=marker)
        if bool((one.high > one.low).any()):
            axes.fill_between(at, thin(one.low), thin(one.high), color=colour, alpha=0.16, lw=0)
    finish(axes, "value")
    if all(float(one.low.min()) > 0 for one in drawn):
        span = max(float(one.high.max()) for one in drawn) / min(float(one.low.min()) for one in drawn)
        subs = (1.0,) if span > 100 else (1.0, 2.0, 5.0) if span > 4 else tuple(range(1, 10))
        log_scale(axes, subs)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=4, borderaxespad=0.2, handlelength=1.6)
    return figure
