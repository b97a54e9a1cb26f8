"""Several runs in one page: which is best, how they learnt, what they cost, and in what they were set up differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml_dist.config.load import flatten, load_config
from imaml_dist.errors import InputError
from imaml_dist.reporting.drawing import finite, series
from imaml_dist.reporting.overlay import Curve, Over, look, overlaid
from imaml_dist.reporting.page import draw, duration, render
from imaml_dist.reporting.reading import Accuracy, read_accuracy, read_headline, read_object, read_records
from imaml_dist.storage.local import atomic_write


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    path: Path
    name: str
    head: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    trained: Accuracy | None

    @property
    def standing(self) -> float:
        """Test accuracy; below all others where there is none."""
        return -1.0 if self.trained is None else self.trained.mean


def write_comparison(runs: Sequence[Path], target: Path, addresses: Sequence[str] | None = None) -> Path:
    """Write a page that compares run directories, finished or not, and return its path.

    Args:
        runs: run directories.
        target: the page.
        addresses: what people know them by, if that is another name.

    Raises:
        InputError: no run directory, the same one twice, or one of its files is damaged.
    """
    known = [str(run.resolve()) for run in runs] if addresses is None else list(addresses)
    if len(set(known)) < len(known):
        raise InputError(f"the same run is given twice among {', '.join(known)}; give each once")
    named = zip(runs, _names(known), strict=True)
    compared = sorted((_read(run, name) for run, name in named), key=lambda run: -run.standing)
    ways = {run.head["way"] for run in compared}
    curves = [Curve(run.name, run.records) for run in compared]
    overs: tuple[Over, ...] = ("meta-step", "seconds")
    page = render(
        "comparison.html.j2",
        runs=[_row(number, run, compared[0]) for number, run in enumerate(compared)],
        same_problem=len({(run.head["data"], run.head["way"], run.head["shot"]) for run in compared}) == 1,
        curves=[
            (over, draw(overlaid(curves, over, min(ways) if len(ways) == 1 else None), f"over-{over}"))
            for over in overs
            if any(run.records for run in compared)
        ],
        differences=_differences(compared),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, page.encode("utf-8", "replace"))
    return target


def _names(known: Sequence[str]) -> list[str]:
    """The shortest ends of addresses that tell them apart."""
    parts = [[part for part in address.split("/") if part] for address in known]
    names = list(known)
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(found[-depth:]) for found in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(run: Path, name: str) -> Compared:
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run} is not a run directory: it has no config.yaml; give directories that training wrote")
    summary, evaluation = read_object(run / "summary.json"), read_object(run / "evaluation.json")
    return Compared(
        path=run,
        name=name,
        head=read_headline(summary, path),
        config=flatten(load_config(path)),
        records=read_records(run / "metrics.jsonl"),
        summary=summary or {},
        trained=read_accuracy(run, summary, evaluation, "trained"),
    )


def _row(number: int, run: Compared, best: Compared) -> dict[str, Any]:
    """What the leaderboard says of a run."""
    validated = series(run.records, "val_accuracy")[1]
    seconds = run.summary.get("seconds", float(series(run.records, "seconds_step")[1].sum()))
    speed = finite(run.summary.get("tasks_per_second"))
    return {
        "colour": look(number)["color"],
        "name": run.name,
        "head": run.head,
        "trained": run.trained,
        "validation": float(validated.max()) if len(validated) else np.nan,
        "steps": len(run.records),
        "of": run.config["run.steps"],
        "finished": bool(run.summary),
        "seconds": duration(seconds),
        "speed": "–" if speed is None else f"{speed:,.1f}",
        **_behind(run, best),
    }


def _behind(run: Compared, best: Compared) -> dict[str, str]:
    """The best run's lead, and whether it is more than chance might have given it."""
    if run is best or run.trained is None or best.trained is None:
        return {"behind": "", "apart": ""}
    behind = best.trained.mean - run.trained.mean
    apart = "disjoint" if behind > best.trained.ci95 + run.trained.ci95 else "overlap"
    return {"behind": f"{100 * behind:.1f} points", "apart": apart}


def _differences(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Fields of the configuration that are not the same in all runs, with what each says."""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    found = [(field, [_shown(run.config, field) for run in runs]) for field in fields]
    return [(field, values) for field, values in found if len(set(values)) > 1]


def _shown(config: dict[str, Any], field: str) -> str:
    if field not in config:
        return "–"
    return "null" if config[field] is None else str(config[field])
