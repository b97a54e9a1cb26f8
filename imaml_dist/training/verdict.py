"""What the diagnoses of many tasks say together: quantiles, shares, and a sentence in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from imaml_dist.training.diagnosis import Reference, System, TaskDiagnosis

STATIONARY = 0.05
"""Stationarity up to which the inner problem counts as solved."""

UNSOLVED = 0.5
"""Relative residual above which the linear system counts as not solved."""

FIRST_ORDER = 0.99
"""Cosine to the first-order gradient above which the implicit part hardly turns it."""

CLOSE, FAR = 0.1, 0.5
"""Median relative error of the meta-gradient up to which it is the implicit gradient, and above which it is none."""

QUANTILES = {"p5": 0.05, "median": 0.5, "p90": 0.9, "p95": 0.95}

FACTS = (
    "stationarity",
    "distance",
    "smallest",
    "smallest_bound",
    "largest",
    "gauss_newton_smallest",
    "gauss_newton_largest",
    "iterations",
    "residual",
    "cosine",
    "reference_stationarity",
    "reference_distance",
    "error",
    "difference_error",
)


def summarised(found: Sequence[TaskDiagnosis]) -> dict[str, Any]:
    """Quantiles of every fact over the tasks that have it, and counts of tasks.

    Returns:
        `{fact: {tasks, p5, median, p90, p95}, ..., counts: {tasks, stationary, positive_definite, not_positive_definite, undecided,
        outcomes: {name: n}, solves: {name: n}, references: {name: n}}}`. A quantile over no task is nan; a task without a number is
        in no quantile, does not count as stationary, and is undecided.
    """
    counts = {
        "tasks": len(found),
        "stationary": sum(task.stationarity <= STATIONARY for task in found),
        **{kind.value: sum(task.system is kind for task in found) for kind in System},
        "outcomes": _counted([task.outcome for task in found]),
        "solves": _counted([task.solve for task in found if task.solve is not None]),
        "references": {kind.value: sum(task.reference is kind for task in found) for kind in Reference},
    }
    solved = [task for task in found if task.solve is not None]
    return {name: _quantiles([float(getattr(task, name)) for task in solved]) for name in FACTS} | {"counts": counts}


def verdict(summary: dict[str, Any]) -> str:
    """One sentence: whether it is an implicit gradient, by how much not, and on what that rests."""
    counts, error, cosine = summary["counts"], summary["error"], summary["cosine"]["median"]
    tasks, compared = counts["tasks"], counts["references"][Reference.COMPARED]
    positive, not_positive, undecided = (_share(counts[kind], tasks) for kind in System)
    said = [
        f"stationarity <= {STATIONARY} on {_share(counts['stationary'], tasks)} of tasks",
        f"H + Lambda positive definite on {positive}, proved not to be on {not_positive}, undecided on {undecided}",
    ]
    if compared:
        said.append(
            f"median error of the meta-gradient {error['median']:.2g} over the {compared} of {tasks} tasks that can be compared "
            f"(90% of these: <= {error['p90']:.2g})"
        )
    if 2 * compared < tasks:
        end = (
            f"central differences exist for {compared} of {tasks} tasks only, so for most tasks nobody can say what the implicit "
            "gradient would be"
        )
    elif error["median"] <= CLOSE:
        end = "this is the implicit gradient"
    elif error["median"] <= FAR:
        end = "this is a rough approximation of the implicit gradient"
    else:
        end = "this is not the implicit gradient"
    near = f"; with a median cosine of {cosine:.4f} it is nearly the first-order one" if cosine > FIRST_ORDER else ""
    return "; ".join(said) + f": {end}{near}."


def _quantiles(values: list[float]) -> dict[str, float]:
    finite = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    if not len(finite):
        return {"tasks": 0} | dict.fromkeys(QUANTILES, math.nan)
    return {"tasks": len(finite)} | {name: float(finite.quantile(q)) for name, q in QUANTILES.items()}


def _counted(names: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%"
