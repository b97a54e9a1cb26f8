"""A run's figures as PNG files, for places that show pictures and no pages, such as MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from imaml_dist.reporting import figures
from imaml_dist.reporting.drawing import series
from imaml_dist.reporting.learned import learned_curves, read_learned
from imaml_dist.reporting.reading import (
    best_step,
    mean_phases,
    outcome_fractions,
    read_accuracy,
    read_episode,
    read_headline,
    read_object,
    read_records,
)
from imaml_dist.reporting.scheduled import read_scheduled, scheduled_curve

DIAGNOSTICS = {"cg_residual": True, "stationarity": True, "cosine": False, "distance": False}
"""Metrics with a picture of their own, and whether a logarithmic scale may show more."""

_DPI = 100


def write_pictures(run: Path, folder: Path) -> list[Path]:
    """Write what there is to see of a run, one file a figure.

    Args:
        run: a run directory with metrics.
        folder: to write to.

    Returns:
        The files.

    Raises:
        InputError: a file of the run is damaged.
    """
    written = []
    for name, figure in _figures(run):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
        written.append(path)
    return written


def _figures(run: Path) -> Iterator[tuple[str, Figure]]:
    records = read_records(run / "metrics.jsonl")
    if not records:
        return
    summary, evaluation = read_object(run / "summary.json"), read_object(run / "evaluation.json")
    way = read_headline(summary, run / "config.yaml")["way"]
    yield "learning-curve", figures.learning_curve(records, way, best_step(summary, records))
    trained, untrained = (read_accuracy(run, summary, evaluation, who) for who in ("trained", "untrained"))
    query = (evaluation or {}).get("query")
    if trained is not None and len(trained.tasks) and isinstance(query, int):
        before = np.zeros(0) if untrained is None else untrained.tasks
        images = min(max(way * query, 1), 10_000)
        yield "accuracy-per-task", figures.accuracy_histogram(trained.tasks, before, images, 1.0 / way)
    for key, log in DIAGNOSTICS.items():
        if len(series(records, key)[1]):
            yield key.replace("_", "-"), figures.diagnostic_curve(records, key, log)
    steps, shares = outcome_fractions(records)
    if len(steps):
        yield "solve-outcomes", figures.solve_outcomes(steps, shares)
    for one in read_scheduled(records):
        yield one.key.replace("_", "-"), scheduled_curve(one)
    if found := read_learned(records):
        yield "learned", learned_curves(found)
    if (episode := read_episode(run / "evaluation.json", evaluation)) is not None:
        yield (
            "episode",
            figures.episode_image(
                episode.classes,
                episode.support,
                episode.support_labels,
                episode.query,
                episode.query_labels,
                episode.predictions,
            ),
        )
    if phases := mean_phases(records):
        yield "time", figures.time_split(phases)
        yield "throughput", figures.throughput(records)
