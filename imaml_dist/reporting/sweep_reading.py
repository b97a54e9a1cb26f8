"""The files of a sweep as its page needs them: trials, their validation curves, and how much each field explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml_dist.errors import InputError
from imaml_dist.reporting.drawing import Floats, finite, series
from imaml_dist.reporting.reading import read_object, read_records


@dataclass(frozen=True)
class TrialRow:
    """One trial of `sweep.json`, with its validations.

    Attributes:
        number: of the trial. status: `finished`, `stopped` or `failed`.
        values: by dotted field.
        accuracy, ci95: of the best validation, nan without any.
        best_step, steps, tasks, losses: counts.
        seconds: of meta-steps. began, ended: seconds since 1970.
        why: it failed.
        curve: meta-steps and validation accuracies, `[2, n]`.
    """

    number: int
    status: str
    values: dict[str, Any]
    accuracy: float
    ci95: float
    best_step: int | None
    steps: int
    tasks: int
    seconds: float
    losses: int
    began: float
    ended: float
    why: str
    curve: Floats


@dataclass(frozen=True)
class FieldAxis:
    """A field of the space as an axis.

    Attributes:
        field: its dotted name.
        log: whether its values are spread over a log scale.
        names: of the places 0, 1, ... where values are told apart by name; empty where they are numbers.
        at: where each trial stands, `[trials]`: a number, its logarithm, or a place.
    """

    field: str
    log: bool
    names: list[str]
    at: Floats

    @property
    def short(self) -> str:
        """The name without the section that nearly all fields are in."""
        return self.field.removeprefix("algorithm.")

    @property
    def share(self) -> Floats:
        """Where each trial stands between the least and the greatest, 0..1."""
        low, high = float(self.at.min()), float(self.at.max())
        return np.full(len(self.at), 0.5) if high == low else (self.at - low) / (high - low)


def read_sweep(folder: Path) -> tuple[dict[str, Any], list[TrialRow]]:
    """`sweep.json` and its trials.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = read_object(folder / "sweep.json")
    if found is None:
        raise InputError(f"{folder} holds no sweep that has ended (no sweep.json); give the --sweep-dir of one")
    try:
        return found, [_row(folder, row) for row in found["trials"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        where = folder / "sweep.json"
        raise InputError(
            f"{where}: a field is missing or of the wrong type ({error!r}); run the sweep's command again"
        ) from error


def _row(folder: Path, row: Mapping[str, Any]) -> TrialRow:
    number, steps = int(row["trial"]), int(row["steps"])
    records = read_records(folder / "trials" / f"{number:04d}" / "metrics.jsonl")
    at, values = series([record for record in records if record["step"] < steps], "val_accuracy")
    return TrialRow(
        number,
        str(row["status"]),
        dict(row["values"]),
        _or_nan(row["accuracy"]),
        _or_nan(row["ci95"]),
        None if row["best_step"] is None else int(row["best_step"]),
        steps,
        int(row["tasks"]),
        float(row["seconds"]),
        int(row["losses"]),
        float(row["began"]),
        float(row["ended"] or row["began"]),
        str(row["why"]),
        np.stack([at + 1, values]),
    )


def _or_nan(value: Any) -> float:
    number = finite(value)
    return math.nan if number is None else number


def axis_of(field: str, space: Mapping[str, Any], trials: Sequence[TrialRow]) -> FieldAxis:
    """A field as an axis: by number where all its values are numbers, else by name."""
    values = [trial.values[field] for trial in trials]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        at = np.array(numbers, dtype=np.float64)
        log = space.get("kind") == "loguniform" or bool(space.get("log"))
        log = log or (at.min() > 0 and at.max() >= 8 * at.min())
        return FieldAxis(field, log, [], np.log10(at) if log else at)
    given = space.get("values", [])
    order = [value for value in given if value in values] + [
        v for n, v in enumerate(values) if v not in given and v not in values[:n]
    ]
    return FieldAxis(
        field, False, [name_of(value) for value in order], np.array([float(order.index(v)) for v in values])
    )


def name_of(value: Any) -> str:
    """A value in a few words; of a section, its kind and what else it says."""
    if isinstance(value, dict):
        return " ".join(str(v) if k == "kind" else f"{k}={name_of(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importance(axis: FieldAxis, accuracy: Floats) -> float | None:
    """The share of the accuracies' variance that a field predicts by itself, 0..1; None where there are too few trials to say.

    Each trial is predicted from the others alone, so that chance predicts nothing: numbers by a parabola, on a log scale where they
    are spread over one, values of which there are few by the mean of the others with the same.

    Args:
        axis: the field, of `[n]` trials.
        accuracy: of the trials.
    """
    n, values = len(accuracy), np.unique(axis.at)
    without = (accuracy.sum() - accuracy) / (n - 1) if n > 1 else accuracy
    whole = float(((accuracy - without) ** 2).sum())
    if len(values) < 2 or n < 5 or whole == 0:
        return None
    if axis.names or len(values) < 4:
        errors = accuracy - without
        for value in values:
            same = axis.at == value
            if (many := int(same.sum())) > 1:
                errors[same] = (accuracy[same] - accuracy[same].mean()) * many / (many - 1)
    else:
        powers = np.vander(axis.share, 3)
        q, _ = np.linalg.qr(powers)
        leverage = (q**2).sum(1)
        errors = (accuracy - q @ (q.T @ accuracy)) / np.maximum(1 - leverage, 1e-9)
    return max(0.0, 1 - float((errors**2).sum()) / whole)
