"""The report of a run: one self-contained page that says what was learnt, how sure that is, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from imaml_dist.config.algorithm import IMAMLConfig
from imaml_dist.config.load import load_config
from imaml_dist.errors import ConfigError, InputError
from imaml_dist.reporting import drawing, figures
from imaml_dist.reporting.cautions import all_well, approximation, cautions
from imaml_dist.reporting.learned import COLOURS, learned_curves, read_learned
from imaml_dist.reporting.page import draw, duration, percent, render
from imaml_dist.reporting.reading import (
    Accuracy,
    Episode,
    best_step,
    mean_phases,
    outcome_fractions,
    part_of,
    read_accuracy,
    read_episode,
    read_headline,
    read_object,
    read_records,
)
from imaml_dist.reporting.scheduled import read_scheduled, scheduled_curve
from imaml_dist.storage.local import atomic_write

PANELS = (
    ("cg_residual", "Residual of the linear solve", True,
     "Relative residual ‖b − Au‖ / ‖b‖ after conjugate gradient. Lower is better: 0 would be the exact implicit "
     "gradient, 1 is no better than answering zero."),
    ("stationarity", "Stationarity of the inner solve", True,
     "Gradient norm of the inner objective where adaptation ends, relative to where it began. The implicit formula "
     "holds at 0; near 1 the inner solver has hardly moved."),
    ("cosine", "Cosine to the first-order gradient", False,
     "1 means that the curvature correction does not turn the gradient at all; the further below 1, the more the "
     "implicit part decides the direction."),
    ("distance", "Distance ‖φ − θ‖", False,
     "How far adaptation carries the parameters from their starting point. Near 0 tasks hardly adapt; a steady climb "
     "says that the proximal term no longer holds them."),
)  # fmt: skip


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path.

    Raises:
        InputError: no run directory, no configuration in it, or one of its files is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run} is not a run directory: it has no config.yaml; give the directory that training wrote")
    config = path.read_bytes().decode("utf-8", "replace")
    records = read_records(run / "metrics.jsonl")
    summary, evaluation = read_object(run / "summary.json"), read_object(run / "evaluation.json")
    head = read_headline(summary, path)
    trained, untrained = (read_accuracy(run, summary, evaluation, who) for who in ("trained", "untrained"))
    best = best_step(summary, records)
    page = render(
        "report.html.j2",
        head=head,
        finished=summary is not None,
        steps=len(records),
        trained=trained,
        untrained=untrained,
        verdict=_verdict(trained, untrained),
        validation=_last_validation(records),
        curve=draw(figures.learning_curve(records, head["way"], best), "curve") if records else None,
        histogram=_histogram(trained, untrained, head["way"], evaluation),
        honesty=_honesty(records) if head["kind"] != "fomaml" else [],
        cautions=cautions(records) if head["kind"] == "imaml" else None,
        all_well=all_well(records),
        approximation=_approximation(path),
        outcomes=_outcomes(records),
        scheduled=[
            {
                "title": one.title,
                "reading": one.reading,
                "ends": one.ends,
                "figure": draw(scheduled_curve(one), one.key),
            }
            for one in read_scheduled(records)
        ],
        learned=_learned(records),
        episode=_episode(read_episode(run / "evaluation.json", evaluation)),
        time=_time(records),
        facts=_facts(summary, records, head),
        chance=f"{100 / head['way']:.3g}%",
        origins=[
            ("Versions", _flat(part_of(summary, "versions"))),
            ("Machine", _flat(part_of(summary, "environment"))),
        ],
        config=config,
    )
    target = run / "report.html"
    atomic_write(target, page.encode("utf-8", "replace"))
    return target


def _verdict(trained: Accuracy | None, untrained: Accuracy | None) -> str:
    if trained is None or untrained is None:
        return ""
    gain, reach = trained.mean - untrained.mean, trained.ci95 + untrained.ci95
    if abs(gain) <= reach:
        return "The two 95% intervals overlap: this run does not show that meta-training made a difference."
    how = "better" if gain > 0 else "worse"
    return f"The two 95% intervals are disjoint: meta-training made the network {how} by {abs(gain) * 100:.1f} points."


def _last_validation(records: list[dict[str, Any]]) -> str:
    steps, values = drawing.series(records, "val_accuracy")
    return f"{percent(float(values[-1]))} at step {int(steps[-1]) + 1}" if len(values) else ""


def _histogram(
    trained: Accuracy | None, untrained: Accuracy | None, way: int, evaluation: dict[str, Any] | None
) -> Markup | None:
    query = (evaluation or {}).get("query")
    if trained is None or not len(trained.tasks) or not isinstance(query, int):
        return None
    before = untrained.tasks if untrained is not None else np.zeros(0)
    images = min(max(way * query, 1), 10_000)
    return draw(figures.accuracy_histogram(trained.tasks, before, images, 1.0 / way), "histogram")


def _honesty(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    panels = []
    for key, title, log, reading in PANELS:
        _, values = drawing.series(records, key)
        if len(values):
            late = float(np.median(values[-max(1, len(values) // 10) :]))
            drawn = draw(figures.diagnostic_curve(records, key, log), key)
            panels.append({"title": title, "late": f"{late:.3g}", "reading": reading, "figure": drawn})
    return panels


def _approximation(path: Path) -> str:
    try:
        algorithm = load_config(path).algorithm
    except ConfigError as error:  # as of another version's run, whose figures can be drawn all the same
        return f"Which curvature and which damping its linear system has is not known, for config.yaml cannot be read ({error})."
    return approximation(algorithm) if isinstance(algorithm, IMAMLConfig) else ""


def _outcomes(records: list[dict[str, Any]]) -> Markup | None:
    steps, shares = outcome_fractions(records)
    return draw(figures.solve_outcomes(steps, shares), "outcomes") if len(steps) else None


def _learned(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    found = read_learned(records)
    if not found:
        return None
    ends = ", ".join(f"{one.name} {one.median[-1]:.3g}" for one in found[: len(COLOURS)])
    return {"figure": draw(learned_curves(found), "learned"), "ends": ends, "left_out": len(found[len(COLOURS) :])}


def _episode(episode: Episode | None) -> dict[str, Any] | None:
    if episode is None:
        return None
    truth = episode.query_labels
    drawn = figures.episode_image(
        episode.classes, episode.support, episode.support_labels, episode.query, truth, episode.predictions
    )
    hits, before = (
        sum(p == y for p, y in zip(guess, truth, strict=False))
        for guess in (episode.predictions, episode.untrained_predictions)
    )
    return {
        "figure": draw(drawn, "episode"),
        "hits": hits,
        "before": before,
        "of": len(truth),
        "classes": len(episode.classes),
        "cut": figures.is_cut(episode.classes, episode.support_labels, truth),
    }


def _time(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    phases = mean_phases(records)
    if not phases:
        return None
    whole = sum(seconds for _, seconds in phases) or 1.0
    rows = [(name, figures.PHASES[name], _seconds(seconds), f"{seconds / whole:.1%}") for name, seconds in phases]
    _, speed = drawing.series(records, "tasks_per_second")
    return {
        "bar": draw(figures.time_split(phases), "phases"),
        "rows": rows,
        "whole": _seconds(whole),
        "speed": draw(figures.throughput(records), "speed") if len(speed) else None,
        "median": f"{np.median(speed):,.1f}" if len(speed) else "",
    }


def _facts(
    summary: dict[str, Any] | None, records: list[dict[str, Any]], head: dict[str, Any]
) -> list[tuple[str, str]]:
    done = summary or {}
    seconds = done.get("seconds", float(drawing.series(records, "seconds_step")[1].sum()))
    excluded = done.get("skipped_tasks", int(drawing.series(records, "excluded")[1].sum()))
    tracked = part_of(summary, "mlflow")
    facts = [
        ("meta-steps", f"{done.get('meta_steps', len(records))}" if summary else f"{len(records)} of {head['of']}"),
        ("time", duration(seconds) + ("" if summary else " (sum over steps)")),
        ("tasks per second", _number(done.get("tasks_per_second"))),
        ("world size", str(done.get("world_size", records[-1].get("world_size", "–") if records else "–"))),
        ("restarts", str(done.get("restarts", "–"))),
        ("excluded tasks", str(excluded)),
        ("skipped steps", str(done.get("skipped_steps", int(drawing.series(records, "step_skipped")[1].sum())))),
        ("best step", str(best_step(summary, records))),
        ("test tasks", str(done.get("tasks_evaluated", "–"))),
        ("params_sha256", str(done.get("params_sha256", "–"))),
        ("data fingerprint", str(part_of(summary, "dataset").get("fingerprint", "–"))),
        ("MLflow run", f"{tracked.get('run_id', '–')} at {tracked.get('uri', '–')}" if tracked else "–"),
    ]
    if warm := part_of(summary, "warm_start"):
        facts.append(("warm start", f"{warm.get('path', '–')}, sha256 {warm.get('sha256', '–')}"))
    return [(label, "–" if value == "None" else value) for label, value in facts]


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), "–" if value is None else str(value)) for key, value in values.items()]


def _number(value: object) -> str:
    number = drawing.finite(value)
    return "–" if number is None else f"{number:,.1f}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
