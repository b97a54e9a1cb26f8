"""The page of a sweep: which trial is best and how sure that is, where good values lie, which field matters, and what it all cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imaml_dist.errors import InputError
from imaml_dist.reporting import sweep_figures as figures
from imaml_dist.reporting.page import draw, duration, percent, render
from imaml_dist.reporting.reading import part_of
from imaml_dist.reporting.sweep_reading import FieldAxis, TrialRow, axis_of, importance, name_of, read_sweep
from imaml_dist.storage.local import atomic_write

FIRST_CHOICE = ("algorithm.lam", "algorithm.solver.max_iterations")
"""The surface is over these if the sweep is, else over the two fields that matter most."""


def write_sweep_report(folder: Path) -> Path:
    """Write `report.html` into a sweep directory, and return its path.

    Raises:
        InputError: no sweep that has ended, or one of its files is damaged.
    """
    found, trials = read_sweep(folder)
    space = part_of(found, "space")
    measured = sorted((t for t in trials if np.isfinite(t.accuracy)), key=lambda t: (-t.accuracy, t.number))
    if not measured or any(set(t.values) != set(space) for t in trials):
        raise InputError(f"{folder / 'sweep.json'} holds no trial that was validated; run the sweep's command again")
    accuracy = np.array([trial.accuracy for trial in measured])
    axes = [axis_of(field, part_of(space, field), measured) for field in space]
    shares = [importance(axis, accuracy) for axis in axes]
    best = measured[0]
    page = render(
        "sweep.html.j2",
        name=str(found["name"]),
        searched=_searched(found, trials),
        test=part_of(found, "test") or None,
        best=best,
        median=float(np.median(accuracy)),
        validation_tasks=found["validation_tasks"],
        verdict=_verdict(measured),
        baseline=bool(found.get("baseline")),
        fields=[axis.short for axis in axes],
        rows=[
            _line(trial, list(space), bool(found.get("baseline")))
            for trial in [*measured, *(t for t in trials if not np.isfinite(t.accuracy))]
        ],
        failures=[(trial.number, trial.why) for trial in trials if trial.why],
        surface=_surface(axes, shares, accuracy, best),
        others=", ".join(axis.short for axis in axes if axis not in _two(axes, shares)),
        parallel=draw(figures.parallel_coordinates(axes, accuracy), "parallel"),
        best_values=_values(best),
        importance=_importance(axes, shares),
        cost=_cost(trials),
        costs=draw(figures.cost_of_trials(trials), "cost"),
        stopping=_stopping(found, trials),
        curves=draw(figures.validation_curves(trials, best.number), "curves"),
        timeline=draw(figures.timeline(trials), "timeline"),
        facts=_facts(found),
        best_yaml=(folder / "best.yaml").read_bytes().decode("utf-8", "replace"),
    )
    target = folder / "report.html"
    atomic_write(target, page.encode("utf-8", "replace"))
    return target


def _searched(found: dict[str, Any], trials: Sequence[TrialRow]) -> str:
    counts = {status: sum(trial.status == status for trial in trials) for status in figures.STATUS}
    spoken = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    searcher, scheduler = part_of(found, "searcher").get("kind"), part_of(found, "scheduler").get("kind")
    return f"{len(trials)} trials ({spoken}) · searcher {searcher} · scheduler {scheduler}"


def _verdict(measured: Sequence[TrialRow]) -> str:
    if len(measured) < 2:
        return "There is one trial, and nothing to compare it with."
    best, second = measured[:2]
    near = [t.number for t in measured[1:] if best.accuracy - t.accuracy <= best.ci95]
    if not near:
        return f"Trial {best.number} is ahead of all others by {100 * (best.accuracy - second.accuracy):.1f} points or more."
    return (
        f"Trial {best.number} is ahead; {len(near)} other{'s' if len(near) > 1 else ''} of {len(measured) - 1} "
        f"{'lie' if len(near) > 1 else 'lies'} within its 95% interval."
    )


def _line(trial: TrialRow, fields: Sequence[str], baseline: bool) -> dict[str, Any]:
    interval = f" ± {100 * trial.ci95:.2f}" if np.isfinite(trial.ci95) else ""
    return {
        "number": trial.number,
        "named": [name_of(trial.values[field]) for field in fields],
        "status": f"{trial.status} (base)" if baseline and trial.number == 0 else trial.status,
        "losses": trial.losses,
        "validation": percent(trial.accuracy, 2) + interval,
        "best_step": "–" if trial.best_step is None else trial.best_step,
        "steps": trial.steps,
        "tasks": f"{trial.tasks:,}",
        "seconds": f"{trial.seconds:.0f}",
    }


def _two(axes: Sequence[FieldAxis], shares: Sequence[float | None]) -> list[FieldAxis]:
    """The fields of the surface."""
    several = [(axis, share or 0.0) for axis, share in zip(axes, shares, strict=True) if len(np.unique(axis.at)) > 1]
    chosen = [axis for axis, _ in several if axis.field in FIRST_CHOICE]
    if len(chosen) == 2:
        return sorted(chosen, key=lambda axis: FIRST_CHOICE.index(axis.field))
    most = [axis for axis, _ in sorted(several, key=lambda pair: -pair[1])[:2]]
    return sorted(most, key=lambda axis: bool(axis.names))  # names have more room at the side


def _surface(
    axes: Sequence[FieldAxis], shares: Sequence[float | None], accuracy: Any, best: TrialRow
) -> dict[str, Any]:
    two = _two(axes, shares)
    if len(two) < 2 or len(accuracy) < 3:
        return {"figure": None, "x": "two fields", "y": "accuracy", "where": ""}
    x, y = two
    where = ", ".join(f"{axis.short} {name_of(best.values[axis.field])}" for axis in two)
    return {
        "figure": draw(figures.response_surface(x, y, accuracy, 0), "surface"),
        "x": x.short,
        "y": y.short,
        "where": where,
    }


def _importance(axes: Sequence[FieldAxis], shares: Sequence[float | None]) -> dict[str, Any]:
    known = [(axis.short, share) for axis, share in zip(axes, shares, strict=True) if share is not None]
    if not known:
        return {"figure": None, "words": ""}
    names, values = zip(*known, strict=True)
    return {
        "figure": draw(figures.importance_bars(names, values), "importance"),
        "words": ", ".join(f"{name} {value:.0%}" for name, value in known),
    }


def _values(trial: TrialRow) -> str:
    return ", ".join(f"{field.removeprefix('algorithm.')} {name_of(value)}" for field, value in trial.values.items())


def _cost(trials: Sequence[TrialRow]) -> str:
    seconds, tasks = sum(trial.seconds for trial in trials), sum(trial.tasks for trial in trials)
    losses = sum(trial.losses for trial in trials)
    again = f" {losses} time{'s' if losses > 1 else ''} a trial crashed and was started again." if losses else ""
    return f"{tasks:,} tasks in {duration(seconds)} of meta-steps, all trials together.{again}"


def _stopping(found: dict[str, Any], trials: Sequence[TrialRow]) -> str:
    scheduler = part_of(found, "scheduler")
    stopped = [trial for trial in trials if trial.status == "stopped"]
    if scheduler.get("kind") == "none":
        return "Scheduler none: every trial was trained to its end."
    longest = max(trial.steps for trial in trials)
    saved = sum(longest - trial.steps for trial in stopped)
    share = saved / (longest * len(trials)) if longest else 0.0
    return (
        f"Scheduler {scheduler.get('kind')} stopped {len(stopped)} of {len(trials)} trials, which saved {saved:,} of "
        f"{longest * len(trials):,} meta-steps ({share:.0%})."
    )


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    budget = ", ".join(f"{key} {value}" for key, value in part_of(found, "budget").items() if value is not None)
    rows = [
        ("budget of a trial", budget or "as the base says"),
        ("data fingerprint", str(found.get("fingerprint", "–"))),
        ("validation manifest, sha256", str(found.get("validation_sha256", "–"))),
        ("test manifest, sha256", str(part_of(found, "test").get("manifest_sha256", "–"))),
    ]
    for section in ("searcher", "scheduler"):
        rows.append((section, ", ".join(f"{key} {value}" for key, value in part_of(found, section).items())))
    for field, space in part_of(found, "space").items():
        rows.append((field, ", ".join(f"{key} {value}" for key, value in space.items())))
    return [*rows, *((f"version of {key}", str(value)) for key, value in part_of(found, "versions").items())]
