"""The figures of a sweep's page: response surface, parallel coordinates, importance, cost, validation curves and timeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from imaml_dist.reporting.drawing import (
    INK,
    MARK,
    QUIET,
    RULE,
    STYLE,
    TRAINED,
    UNTRAINED,
    WIDTH,
    Floats,
    finish,
    new_axes,
)
from imaml_dist.reporting.end_labels import End, name_ends
from imaml_dist.reporting.sweep_reading import FieldAxis, TrialRow

STATUS = {"finished": TRAINED, "stopped": "#e0a458", "failed": "#c0392b"}
"""Colours of how a trial ended."""

_COLOURS = colormaps["viridis"]
_GRAIN, _REACH = 60, 0.16
"""Cells of a side of the surface, and how far a trial is heard in it, of a side."""


@rc_context(STYLE)
def response_surface(x: FieldAxis, y: FieldAxis, accuracy: Floats, best: int) -> Figure:
    """Accuracy over two fields: every trial as a dot, and between them the mean of those near by.

    Args:
        x, y: the fields, of `[n]` trials.
        accuracy: of the trials.
        best: place of the best one among them, ringed.
    """
    figure, axes = new_axes(WIDTH, 4.4, left=1.85 if y.names else 0.95, right=1.0, top=0.15, bottom=0.55)
    scale = Normalize(float(accuracy.min()), float(max(accuracy.max(), accuracy.min() + 1e-6)))
    (left, right), (low, high) = _span(x), _span(y)
    sides = [np.linspace(0, 1, _GRAIN)] * 2
    across, down = np.meshgrid(*sides)
    px, py = (x.at - left) / (right - left), (y.at - low) / (high - low)
    squared = (across[..., None] - px) ** 2 + (down[..., None] - py) ** 2
    weight = np.exp(-squared / (2 * _REACH**2))
    surface = (weight * accuracy).sum(-1) / weight.sum(-1)
    shown = np.ma.masked_where(squared.min(-1) > (2 * _REACH) ** 2, surface)
    axes.imshow(
        shown, extent=(left, right, low, high), origin="lower", aspect="auto", cmap=_COLOURS, norm=scale, alpha=0.45,
        interpolation="bilinear",
    )  # fmt: skip
    dots = axes.scatter(x.at, y.at, c=accuracy, cmap=_COLOURS, norm=scale, s=46, edgecolor="white", lw=0.8, zorder=3)
    axes.scatter(x.at[best], y.at[best], s=150, facecolor="none", edgecolor=MARK, lw=1.6, zorder=4)
    axes.annotate(
        f"best {accuracy[best]:.1%}", (x.at[best], y.at[best]), xytext=(0, 10), textcoords="offset points", ha="center",
        color=MARK, zorder=5,
    )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))
    _ticks(axes, x, "x")
    _ticks(axes, y, "y")
    axes.grid(visible=False)
    finish(axes, y.short, x.short)
    box = axes.get_position()
    bar = figure.colorbar(dots, cax=figure.add_axes((box.x1 + 0.015, box.y0, 0.016, box.height)))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.ax.tick_params(length=2, width=0.6)
    return figure


@rc_context(STYLE)
def parallel_coordinates(axes_of: Sequence[FieldAxis], accuracy: Floats) -> Figure:
    """Every trial as a line through its values, the better the warmer; the last axis is accuracy."""
    figure, axes = new_axes(WIDTH, 3.4, left=0.75, right=0.75, top=0.42, bottom=0.2)
    low, high = float(accuracy.min()), float(accuracy.max())
    reached = np.full(len(accuracy), 0.5) if high == low else (accuracy - low) / (high - low)
    columns = [*(axis.share for axis in axes_of), reached]
    for trial in np.argsort(reached):
        heights = [float(column[trial]) for column in columns]
        best = trial == int(np.argmax(reached))
        axes.plot(
            range(len(columns)), heights, color=MARK if best else _COLOURS(reached[trial]), lw=2.2 if best else 1.1,
            alpha=1.0 if best else 0.75, zorder=4 if best else 2,
        )  # fmt: skip
    for place, axis in enumerate(axes_of):
        _upright(axes, place, axis)
    _rule(axes, len(axes_of), "validation", [(0.0, f"{low:.1%}"), (1.0, f"{high:.1%}")])
    axes.set(xlim=(-0.1, len(columns) - 0.9), ylim=(-0.06, 1.06))
    axes.axis("off")
    return figure


@rc_context(STYLE)
def importance_bars(names: Sequence[str], shares: Sequence[float]) -> Figure:
    """Share of the variance that each field predicts by itself, the largest on top."""
    height = 0.5 + 0.32 * len(names)
    figure, axes = new_axes(WIDTH, height, left=2.0, right=0.6, top=0.05, bottom=0.42)
    order = np.argsort(shares)
    axes.barh(range(len(names)), [shares[i] for i in order], color=TRAINED, height=0.62)
    for place, i in enumerate(order):
        axes.text(shares[i] + 0.01, place, f"{shares[i]:.0%}", va="center", color=QUIET)
    axes.set_yticks(range(len(names)), [names[i] for i in order])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    finish(axes, "", "share of the variance of validation accuracy")
    return figure


@rc_context(STYLE)
def cost_of_trials(trials: Sequence[TrialRow]) -> Figure:
    """What each trial cost in seconds of meta-steps, and what it reached for it."""
    figure, axes = new_axes(WIDTH, 3.0, left=0.66, right=0.12, top=0.35)
    for status, colour in STATUS.items():
        some = [trial for trial in trials if trial.status == status and np.isfinite(trial.accuracy)]
        if some:
            axes.errorbar(
                [t.seconds for t in some], [t.accuracy for t in some], yerr=[t.ci95 for t in some], fmt="o", ms=5, color=colour,
                mec="white", mew=0.6, elinewidth=0.9, capsize=2, label=status,
            )  # fmt: skip
            for trial in some:
                axes.annotate(
                    str(trial.number), (trial.seconds, trial.accuracy), xytext=(5, 4), textcoords="offset points", color=QUIET,
                    fontsize=7,
                )  # fmt: skip
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(axes, "validation accuracy", "seconds of meta-steps")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=3, borderaxespad=0.2, handlelength=1.2)
    return figure


@rc_context(STYLE)
def validation_curves(trials: Sequence[TrialRow], best: int) -> Figure:
    """Validation accuracy of every trial over meta-steps; a cross where a scheduler stopped one.

    Where more trials end than there is room for numbers, the best one and those with the highest last validation are numbered.
    """
    figure, axes = new_axes(WIDTH, 3.2, left=0.66, right=0.2, top=0.12)
    ends = []
    for trial in trials:
        at, values = trial.curve
        if not len(at):
            continue
        chosen = trial.number == best
        colour = MARK if chosen else TRAINED if trial.status == "finished" else UNTRAINED
        axes.plot(at, values, color=colour, lw=2.0 if chosen else 1.0, marker=".", ms=4, zorder=4 if chosen else 2)
        if trial.status == "stopped":
            axes.plot(at[-1], values[-1], "x", color=STATUS["stopped"], ms=6, mew=1.6, zorder=3)
        ends.append(End(str(trial.number), float(at[-1]), float(values[-1]), colour))
    axes.margins(x=0.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(axes, "validation accuracy")
    name_ends(axes, sorted(ends, key=lambda end: (end.name != str(best), -end.y)))
    return figure


@rc_context(STYLE)
def timeline(trials: Sequence[TrialRow]) -> Figure:
    """When each trial began and ended, by the clock, and how."""
    height = 0.75 + min(0.2, 6.0 / len(trials)) * len(trials)
    figure, axes = new_axes(WIDTH, height, left=0.66, right=0.12, top=0.3)
    start = min(trial.began for trial in trials)
    unit, name = (60.0, "minutes") if max(trial.ended for trial in trials) - start > 300 else (1.0, "seconds")
    for status, colour in STATUS.items():
        some = [trial for trial in trials if trial.status == status]
        if some:
            axes.barh(
                [t.number for t in some], [(t.ended - t.began) / unit for t in some],
                left=[(t.began - start) / unit for t in some], height=0.66, color=colour, label=status,
            )  # fmt: skip
    axes.set_ylim(max(t.number for t in trials) + 0.6, -0.6)
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(visible=False)
    finish(axes, "trial", f"{name} since the sweep began")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=3, borderaxespad=0.2, handlelength=1.2)
    return figure


def _span(axis: FieldAxis) -> tuple[float, float]:
    low, high = float(axis.at.min()), float(axis.at.max())
    room = 0.08 * (high - low) or 0.5
    return low - room, high + room


def _ticks(axes: Axes, axis: FieldAxis, which: str) -> None:
    side = axes.xaxis if which == "x" else axes.yaxis
    if axis.names:
        side.set_major_locator(FixedLocator(range(len(axis.names))))
        side.set_major_formatter(FuncFormatter(lambda value, _: _shortened(axis.names[round(value)])))
    elif axis.log or len(np.unique(axis.at)) <= 6:
        places = sorted(set(axis.at.tolist())) if len(np.unique(axis.at)) <= 6 else _decades(*_span(axis))
        side.set_major_locator(FixedLocator(places))
        side.set_minor_locator(NullLocator())
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value if axis.log else value:.3g}"))
    else:
        side.set_major_locator(MaxNLocator(7))


def _decades(low: float, high: float) -> list[float]:
    """Places of 1, 2, 5, 10, ... on a log scale; of powers of ten alone where there are many."""
    steps = (1.0,) if high - low > 3 else (1.0, 2.0, 5.0)
    every = [n + float(np.log10(s)) for n in range(int(np.floor(low)), int(np.ceil(high)) + 1) for s in steps]
    return [place for place in every if low <= place <= high]


def _upright(axes: Axes, place: int, axis: FieldAxis) -> None:
    low, high = float(axis.at.min()), float(axis.at.max())
    if axis.names:
        marks = [((n - low) / (high - low) if high > low else 0.5, name) for n, name in enumerate(axis.names)]
    else:
        ends = [(0.0, low), (1.0, high)] if high > low else [(0.5, low)]
        marks = [(share, f"{10**value if axis.log else value:.3g}") for share, value in ends]
    _rule(axes, place, axis.short, marks)


def _rule(axes: Axes, place: int, title: str, marks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(place, ymin=0.053, ymax=0.947, color=RULE, lw=1.2, zorder=1)
    axes.text(place, 1.09, title, ha="center", va="bottom", color=INK, clip_on=False)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    for share, name in marks:
        axes.text(
            place - 0.02, share, _shortened(name), ha="right", va="center", color=QUIET, fontsize=7.5, bbox=paper, zorder=6
        )  # fmt: skip


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:20]}…"
