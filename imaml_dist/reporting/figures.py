"""The figures of a report: no global plotting state, and the same bytes for the same numbers.

Every builder returns a plain `Figure`: `drawing.svg` makes text for a page of it, `figure.savefig("x.png", dpi=150)`
a picture for a README.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from imaml_dist.errors import InputError
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
    Records,
    finish,
    finite,
    log_scale,
    new_axes,
    noisy_line,
    series,
    thin,
)

RIGHT, WRONG = "#6aa583", "#c0392b"
LIMITS = (20, 5, 15)
OUTCOMES = {"converged": "#6aa583", "budget spent": "#b7cdd8", "negative curvature": "#e0a458", "not finite": "#c0392b"}
"""Colours of the ends of a linear solve, in the order of `reading.OUTCOMES`."""
PHASES = {
    "data": "#a9bcc8",
    "inner": "#1f6f8b",
    "solve": "#e0a458",
    "reduce": "#8a6fa8",
    "outer": "#6aa583",
    "other": RULE,
}
"""Colours of the phases of a meta-step."""


@rc_context(STYLE)
def learning_curve(records: Sequence[Mapping[str, Any]], way: int, best_step: int | None) -> Figure:
    """Query accuracy over meta-steps: training tasks, validation points with their 95% intervals, chance.

    Args:
        records: lines of metrics.jsonl, in order of step.
        way: N; chance is 1/N.
        best_step: meta-steps before the best checkpoint, marked if given.
    """
    figure, axes = new_axes(WIDTH, 3.7, left=0.66, right=0.12, top=0.4)
    steps, accuracy = series(records, "query_accuracy")
    noisy_line(axes, steps, accuracy, "training tasks")
    at, points = series(records, "val_accuracy")
    half = [abs(finite(r.get("val_ci95")) or 0.0) for r in records if finite(r.get("val_accuracy")) is not None]
    if len(at):
        axes.errorbar(
            at, points, yerr=half, fmt="o", ms=4, color=MARK, mec="white", mew=0.6, elinewidth=1, capsize=2.2,
            zorder=4, label="validation, 95% interval",
        )  # fmt: skip
    chance = 1.0 / way
    lowest = min([chance, *accuracy.tolist(), *points.tolist()])
    axes.set_ylim(max(0.0, lowest - 0.08), 1.02)
    axes.axhline(chance, color=QUIET, lw=0.9, ls=(0, (4, 3)))
    axes.annotate(
        f"chance {100 * chance:.3g}%", (1, chance), xycoords=("axes fraction", "data"), xytext=(-2, 3),
        textcoords="offset points", ha="right", color=QUIET,
    )  # fmt: skip
    if best_step is not None:
        last = best_step - 1  # records count meta-steps from 0
        axes.axvline(last, color=MARK, lw=0.8, ls=":")
        for best in points[at == last]:
            axes.plot(last, best, "o", ms=10, mfc="none", mec=MARK, mew=1.3, zorder=5)
        late = last > (steps[0] + steps[-1]) / 2 if len(steps) else False
        axes.annotate(
            f"best checkpoint, step {best_step}", (last, 0.06), xycoords=("data", "axes fraction"),
            xytext=(-5 if late else 5, 22), textcoords="offset points", ha="right" if late else "left", color=MARK,
        )  # fmt: skip
    finish(axes, "query accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=3, borderaxespad=0.2, handlelength=1.6)
    return figure


@rc_context(STYLE)
def accuracy_histogram(trained: Floats, untrained: Floats, images: int, chance: float) -> Figure:
    """How many test tasks reached which accuracy; `images` query images per task set the grain of the bins."""
    figure, axes = new_axes(WIDTH, 2.9, left=0.66, right=0.12, top=0.4)
    grain = max(1, -(-images // 40))
    edges = (np.arange(0, images + grain + 1, grain) - 0.5) / images
    for values, name, colour, hatch in (
        (untrained, "without meta-training", UNTRAINED, "////"),
        (trained, "meta-trained", TRAINED, ""),
    ):
        if not len(values):
            continue
        counts, _ = np.histogram(values.clip(0, 1), bins=edges)
        span = np.flatnonzero(counts)[[0, -1]]
        style: dict[str, Any] = {"facecolor": "white" if hatch else colour, "alpha": 0.88, "hatch": hatch, "lw": 0.9}
        cut = edges[span[0] : span[1] + 2]
        axes.stairs(counts[span[0] : span[1] + 1], cut, fill=True, edgecolor=colour, label=name, **style)
        mean, ink = float(values.mean()), QUIET if hatch else TRAINED
        left = bool(hatch) or mean > 0.85
        axes.axvline(mean, color=ink, lw=1.1, ls="--")
        axes.annotate(
            f"mean {mean:.1%}", (mean, 1), xycoords=("data", "axes fraction"), xytext=(-4 if left else 4, -9),
            textcoords="offset points", ha="right" if left else "left", color=ink,
        )  # fmt: skip
    axes.axvline(chance, color=QUIET, lw=0.9, ls=":")
    top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "top", "rotation": 90}
    axes.text(chance - 0.004, 0.98, "chance", color=QUIET, **top)
    axes.set_xlim(0, float(edges[-1]))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(axes, "test tasks", "accuracy on one task")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=2, borderaxespad=0.2, handlelength=1.6)
    return figure


@rc_context(STYLE)
def diagnostic_curve(records: Records, key: str, log: bool) -> Figure:
    """One small multiple: a metric over meta-steps, on a log scale where that shows more."""
    figure, axes = new_axes(WIDTH / 2 - 0.1, 1.8, left=0.55, right=0.12, top=0.1, bottom=0.42)
    steps, values = series(records, key)
    noisy_line(axes, steps, values)
    finish(axes, "")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if log and len(values) and values.max() > 3 * values.min() > 0:
        log_scale(axes, (1.0,) if values.max() > 100 * values.min() else (1.0, 2.0, 5.0))
    return figure


@rc_context(STYLE)
def solve_outcomes(steps: Floats, shares: Floats) -> Figure:
    """How the linear solves ended: shares `[4, n]` of `OUTCOMES` over meta-steps `[n]`, stacked."""
    figure, axes = new_axes(WIDTH, 1.75, left=0.66, right=0.12, top=0.4)
    if len(steps) == 1:  # an area needs a width
        steps, shares = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(shares, 2, axis=1)
    names = [f"{name} {share.mean():.1%}" for name, share in zip(OUTCOMES, shares, strict=True)]
    stacked = np.stack([thin(share, 300) for share in shares])
    at = thin(steps, 300)
    at[[0, -1]] = steps[[0, -1]]
    axes.stackplot(at, stacked, labels=names, colors=list(OUTCOMES.values()), lw=0)
    axes.margins(x=0)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    finish(axes, "share of tasks")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=4, borderaxespad=0.2, handlelength=1.0)
    return figure


@rc_context(STYLE)
def time_split(phases: Sequence[tuple[str, float]]) -> Figure:
    """A mean meta-step as one bar, cut by phase."""
    figure, axes = new_axes(WIDTH, 0.5, left=0.02, right=0.02, top=0.02, bottom=0.02)
    whole, left = sum(seconds for _, seconds in phases) or 1.0, 0.0
    for name, seconds in phases:
        share = seconds / whole
        axes.barh(0, share, left=left, height=0.9, color=PHASES[name], edgecolor="white", lw=1)
        if share > 0.08:
            ink = "white" if name in ("inner", "reduce") else INK
            axes.text(left + share / 2, 0, f"{name} {share:.0%}", ha="center", va="center", color=ink)
        left += share
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.axis("off")
    return figure


@rc_context(STYLE)
def throughput(records: Records) -> Figure:
    """Tasks per second over meta-steps."""
    figure, axes = new_axes(WIDTH, 1.6, left=0.66, right=0.12, top=0.12)
    steps, values = series(records, "tasks_per_second")
    noisy_line(axes, steps, values)
    axes.set_ylim(0, float(np.percentile(values, 99.5)) * 1.15 if len(values) else 1.0)
    finish(axes, "tasks / s")
    return figure


@rc_context(STYLE)
def episode_image(
    classes: Sequence[str],
    support: NDArray[np.uint8],
    support_labels: Sequence[int],
    query: NDArray[np.uint8],
    query_labels: Sequence[int],
    predictions: Sequence[int],
) -> Figure:
    """One episode, a row per class: its support images, then its query images framed by right and wrong.

    At most `LIMITS` classes, support and query images per class are drawn.

    Args:
        classes: keys of the classes; the class of label 0 is drawn as number 1.
        support: uint8 `[n, H, W, C]`, 255 is ink for C = 1 and colour as it is for C = 3.
        support_labels: of `support`. query, query_labels: likewise. predictions: for `query`.

    Raises:
        InputError: labels and images do not fit together.
    """
    counts = (len(support), len(query), len(query))
    if (len(support_labels), len(query_labels), len(predictions)) != counts or support.shape[1:] != query.shape[1:]:
        raise InputError("episode: images, labels and predictions differ in number or shape; evaluate the run again")
    rows = [
        ([i for i, y in enumerate(support_labels) if y == c], [i for i, y in enumerate(query_labels) if y == c])
        for c in range(min(len(classes), LIMITS[0]))
    ]
    shots = min(max((len(s) for s, _ in rows), default=0), LIMITS[1])
    queries = min(max((len(q) for _, q in rows), default=0), LIMITS[2])
    support, query = _paper(support), _paper(query)
    height, width = support.shape[1:3]
    gap, below = max(2, width // 6), max(5, round(height * 0.42))
    across, down = width + gap, height + below
    tiles = (shots + queries) * across + width // 2
    scale = min((WIDTH - 1.8) / tiles, 0.5 / width)  # inches per pixel; the rest is for numbers, names and hits
    room = round(1.3 / scale)
    first_query = room + shots * across + width // 2
    size = (len(rows) * down, room + tiles + round(0.5 / scale))
    canvas = np.full((*size, 3), 255, dtype=np.uint8)
    top = round(0.24 / scale)
    figure = Figure(figsize=(size[1] * scale, (size[0] + top) * scale))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[1]), ylim=(size[0], -top))
    axes.axis("off")
    for row, (name, (shown, asked)) in enumerate(zip(classes, rows, strict=False)):
        y = row * down
        axes.text(0.24 / scale, y + height / 2, str(row + 1), ha="right", va="center", fontsize=11, fontweight="bold")
        axes.text(0.31 / scale, y + height / 2, _wrapped(name), va="center", fontsize=6.6, color=QUIET, linespacing=1.1)
        for column, i in enumerate(shown[:shots]):
            x = room + column * across
            canvas[y : y + height, x : x + width] = support[i]
            axes.add_patch(_frame(x, y, width, height, edgecolor=QUIET, lw=0.7))
        for column, i in enumerate(asked[:queries]):
            x, right = first_query + column * across, predictions[i] == row
            canvas[y : y + height, x : x + width] = query[i]
            axes.add_patch(_frame(x, y, width, height, edgecolor=RIGHT if right else WRONG, lw=1.1 if right else 2.2))
            if not right:
                label = f"→ {predictions[i] + 1}"
                below_tile: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "fontweight": "bold"}
                axes.text(x + width / 2, y + height + below * 0.52, label, color=WRONG, **below_tile)
        hits = sum(predictions[i] == row for i in asked)
        axes.text(size[1], y + height / 2, f"{hits}/{len(asked)}", ha="right", va="center", color=QUIET, fontsize=8)
    for x, title in ((room, "support"), (first_query, "query")):
        axes.text(x, -top * 0.55, title, va="center", color=QUIET)
    if canvas.size:
        axes.imshow(canvas, interpolation="none", extent=(0, size[1], size[0], 0), aspect="auto", zorder=0)
        axes.set(xlim=(0, size[1]), ylim=(size[0], -top))
    return figure


def is_cut(classes: Sequence[str], support_labels: Sequence[int], query_labels: Sequence[int]) -> bool:
    """Whether `episode_image` leaves something out."""
    most = (max(map(labels.count, set(labels)), default=0) for labels in (list(support_labels), list(query_labels)))
    return any(n > limit for n, limit in zip((len(classes), *most), LIMITS, strict=True))


def _paper(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[n, H, W, 3]` as printed: one channel is dark ink on white; large images are averaged down, for small pages."""
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise InputError(
            f"episode: images of shape {list(images.shape)}, expected [n, H, W, C]; evaluate the run again"
        )
    if images.shape[3] != 3:
        images = np.repeat(255 - images[..., :1], 3, axis=3)
    n, height, width, _ = images.shape
    factor = -(-max(height, width) // 56)
    if factor == 1 or min(height, width) < factor:
        return images
    cut = images[:, : height // factor * factor, : width // factor * factor]
    blocks = cut.reshape(n, height // factor, factor, width // factor, factor, 3)
    return np.asarray(blocks.mean(axis=(2, 4)).round(), dtype=np.uint8)


def _frame(x: float, y: float, width: float, height: float, **style: Any) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, **style)


def _wrapped(name: str) -> str:
    """A class key in at most three short lines, without characters that do not print."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    parts = [part if len(part) <= 16 else f"{part[:9]}…{part[-6:]}" for part in clean.split("/")]
    return "\n".join(parts[-3:])
