"""The figures of what a schedule, or the residual of the solves, changes while a run goes on: lambda, and the CG steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from imaml_dist.reporting.drawing import (
    MAX_POINTS,
    STYLE,
    TRAINED,
    WIDTH,
    Floats,
    Records,
    finish,
    log_scale,
    new_axes,
    series,
)

READINGS = {
    "algorithm_lam": (
        "Lambda",
        "The strength of the proximal term, by its schedule. A larger one holds tasks closer to the common parameters.",
    ),
    "algorithm_cg_steps": (
        "CG steps at most",
        "What a linear solve may spend, by a schedule or by the residuals. Each step costs a product with the curvature.",
    ),
}
"""Title and explanation by the key in the metrics, where it stands only if the value may change."""


@dataclass(frozen=True)
class Scheduled:
    """One value over meta-steps `[n]`."""

    key: str
    steps: Floats
    values: Floats

    @property
    def title(self) -> str:
        """For people."""
        return READINGS[self.key][0]

    @property
    def reading(self) -> str:
        """What it means."""
        return READINGS[self.key][1]

    @property
    def ends(self) -> str:
        """`0.1 at first, 2 at the end`."""
        return f"{self.values[0]:.3g} at first, {self.values[-1]:.3g} at the end"


def read_scheduled(records: Records) -> Iterator[Scheduled]:
    """Every value that the records tell of."""
    for key in READINGS:
        steps, values = series(records, key)
        if len(values):
            yield Scheduled(key, steps, values)


@rc_context(STYLE)
def scheduled_curve(one: Scheduled) -> Figure:
    """Its value as it was at every meta-step, without means."""
    figure, axes = new_axes(WIDTH / 2 - 0.1, 1.8, left=0.55, right=0.12, top=0.1, bottom=0.42)
    steps, values = _corners(one)
    axes.plot(steps, values, color=TRAINED, lw=1.7, drawstyle="steps-post", marker="." if len(steps) == 1 else "")
    finish(axes, "")
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 10 * low:
        log_scale(axes, (1.0,) if high > 100 * low else (1.0, 2.0, 5.0))
    else:
        axes.set_ylim(0, high * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=one.key == "algorithm_cg_steps"))
    return figure


def _corners(one: Scheduled) -> tuple[Floats, Floats]:
    """Where the value is another than before, with the first and the last; of very many every so many."""
    at = np.flatnonzero(np.append(True, one.values[1:] != one.values[:-1]))
    at = np.unique([*at[:: -(-len(at) // MAX_POINTS)], len(one.values) - 1])
    return one.steps[at], one.values[at]
