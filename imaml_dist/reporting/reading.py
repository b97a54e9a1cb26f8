"""The files of a run directory as the report needs them: what is missing is None, what is damaged is a clear error."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaml_dist.config.load import load_config
from imaml_dist.errors import InputError
from imaml_dist.reporting.drawing import Floats, Records, finite, series

ALGORITHMS = {"imaml": "iMAML, implicit gradients", "fomaml": "first-order MAML"}

OUTCOMES = ("cg_converged", "cg_max_iterations", "cg_negative_curvature", "cg_non_finite")
PHASES = ("data", "inner", "solve", "reduce", "outer")


@dataclass(frozen=True)
class Accuracy:
    """A mean accuracy over tasks with the half-width of its 95% interval, and its tasks where they are known.

    `inductive` is the same with every query image classified alone; None where that was not measured.
    """

    mean: float
    ci95: float
    tasks: NDArray[np.float64]
    inductive: Accuracy | None = None


@dataclass(frozen=True)
class Episode:
    """The drawn episode of evaluation.json."""

    classes: list[str]
    support: NDArray[np.uint8]
    support_labels: list[int]
    query: NDArray[np.uint8]
    query_labels: list[int]
    predictions: list[int]
    untrained_predictions: list[int]


def read_records(path: Path) -> list[dict[str, Any]]:
    """One record per step in order of step: a restarted run repeats steps, and what it wrote last counts.

    An incomplete last line is one that is still being written, and left out.

    Raises:
        InputError: another line is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
            records[step] = {**record, "step": step}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break  # still being written
            raise InputError(
                f"{path} line {number} is not a record with a step ({error!r}); remove that line"
            ) from error
    return [records[step] for step in sorted(records)]


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is no file yet.

    Raises:
        InputError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); move it away or restore it, then write the report again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, expected a JSON object; move it away or restore it")
    return value


def part_of(whole: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The mapping under a key; empty where there is none."""
    value = (whole or {}).get(key)
    return value if isinstance(value, dict) else {}


def read_headline(summary: dict[str, Any] | None, config: Path) -> dict[str, Any]:
    """What names a run: from its summary, before there is one from its configuration."""
    if summary is None:
        plan = load_config(config)
        name, kind, data = plan.name, str(plan.algorithm.kind), Path(plan.data.url).name
        way, shot, of = plan.data.way, plan.data.shot, plan.run.steps
    else:
        try:
            name, kind = str(summary["name"]), str(summary["algorithm"])
            data = str(part_of(summary, "dataset").get("name", "?"))
            way, shot, of = int(summary["way"]), int(summary["shot"]), int(summary["meta_steps"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            where = config.with_name("summary.json")
            raise InputError(
                f"{where}: a field is missing or of the wrong type ({error!r}); restore the file"
            ) from error
    title = ALGORITHMS.get(kind, kind)
    return {"name": name, "kind": kind, "algorithm": title, "data": data, "way": max(way, 1), "shot": shot, "of": of}


def read_accuracy(
    run: Path, summary: dict[str, Any] | None, evaluation: dict[str, Any] | None, who: str
) -> Accuracy | None:
    """Transductive, with the inductive one inside; from evaluation.json if it is there, else from summary.json.

    Raises:
        InputError: not a number.
    """
    part = part_of(evaluation, who)
    keys = ("test_accuracy", "ci95") if who == "trained" else ("untrained_accuracy", "untrained_ci95")
    try:
        alone = _accuracy(part_of(part, "inductive"), [(summary or {}).get(f"{key}_inductive") for key in keys])
        return _accuracy(part, [(summary or {}).get(key) for key in keys], alone)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{run}: the {who} accuracy is not made of numbers ({error}); evaluate the run again"
        ) from error


def _accuracy(part: dict[str, Any], summarised: list[Any], inductive: Accuracy | None = None) -> Accuracy | None:
    mean, ci95 = summarised if part.get("mean") is None else (part["mean"], part.get("ci95"))
    if mean is None:
        return None
    tasks = np.asarray(part.get("per_task") or [], dtype=np.float64).reshape(-1)
    return Accuracy(float(mean), float(ci95 or 0.0), tasks[np.isfinite(tasks)], inductive)


def best_step(summary: dict[str, Any] | None, records: list[dict[str, Any]]) -> int | None:
    """Meta-steps before the best checkpoint by validation, as its folder is named; None where nothing was validated.

    As the summary says, before there is one as recorded so far.
    """
    best = (summary or {}).get("best_step")
    if isinstance(best, int):
        return best if best >= 0 else None
    steps, values = series(records, "val_accuracy")
    return int(steps[values.argmax()]) + 1 if len(values) else None


def outcome_fractions(records: Records) -> tuple[Floats, Floats]:
    """Steps `[n]` and the share of every CG outcome `[4, n]`, of the records that counted any."""
    rows = [(r["step"], *(finite(r.get(key)) or 0.0 for key in OUTCOMES)) for r in records]
    table = np.array(rows, dtype=np.float64).reshape(-1, 1 + len(OUTCOMES))
    table = table[(table[:, 1:].sum(axis=1) > 0) & np.isfinite(table).all(axis=1)]
    return table[:, 0], table[:, 1:].T / table[:, 1:].sum(axis=1)


def mean_phases(records: Records) -> list[tuple[str, float]]:
    """Name and mean seconds of every phase of a step, with what they leave of the whole as `other`."""
    timed = [(name, series(records, f"seconds_{name}")[1]) for name in PHASES]
    phases = [(name, float(seconds.mean())) for name, seconds in timed if len(seconds)]
    _, whole = series(records, "seconds_step")
    rest = float(whole.mean()) - sum(seconds for _, seconds in phases) if phases and len(whole) else 0.0
    return [*phases, ("other", rest)] if rest > 0.005 * sum(seconds for _, seconds in phases) else phases


def read_episode(path: Path, evaluation: dict[str, Any] | None) -> Episode | None:
    """The drawn episode; None where there is none.

    Raises:
        InputError: a field is missing or does not fit the shape.
    """
    raw = part_of(evaluation, "episode")
    if not raw:
        return None
    try:
        shape = tuple(int(n) for n in raw["shape"])
        labels = {
            k: [int(y) for y in raw[k]]
            for k in ("support_labels", "query_labels", "predictions", "untrained_predictions")
        }
        support, query = (
            np.frombuffer(base64.b64decode(raw[k], validate=True), dtype=np.uint8).reshape(-1, *shape)
            for k in ("support", "query")
        )
        return Episode([str(c) for c in raw["classes"]], support=support, query=query, **labels)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: the episode cannot be read ({error!r}); evaluate the run again") from error
