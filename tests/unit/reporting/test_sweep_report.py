"""The page of a sweep: escaped, reproducible, and with words for what cannot be drawn; importance finds the field that matters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imaml_dist.errors import InputError
from imaml_dist.reporting.sweep_reading import axis_of, importance, read_sweep
from imaml_dist.reporting.sweep_report import write_sweep_report

SPACE = {
    "algorithm.lam": {"kind": "loguniform", "low": 0.01, "high": 10.0},
    "algorithm.solver.max_iterations": {"kind": "choice", "values": [1, 2, 5, 10]},
    "algorithm.inner": {
        "kind": "choice",
        "values": [{"kind": "adam", "lr": 0.01}, {"kind": "<img src=x onerror=alert(1)>", "steps": 3}],
    },
}


def write_sweep(folder: Path, trials: int = 16, space: dict[str, Any] = SPACE) -> Path:
    """A sweep whose accuracy depends on lambda, a little on the CG steps, and on nothing else."""
    generator = np.random.default_rng(4)
    folder.mkdir()
    rows = []
    for number in range(trials):
        lam, steps = 10 ** generator.uniform(-2, 1), int(generator.choice([1, 2, 5, 10]))
        inner = space.get("algorithm.inner", SPACE["algorithm.inner"])["values"][number % 2]
        values = {"algorithm.lam": lam, "algorithm.solver.max_iterations": steps, "algorithm.inner": inner}
        reached = 0.9 - 0.08 * (math.log10(lam) + 0.7) ** 2 + 0.004 * steps + generator.normal(0, 0.004)
        status = "failed" if number == 7 else "stopped" if reached < 0.8 else "finished"
        end = 60 if status == "finished" else 20
        run = folder / "trials" / f"{number:04d}"
        run.mkdir(parents=True)
        curve = {step: reached - 0.3 * math.exp(-step / 15) for step in range(20, 61, 20)}
        lines = [
            {"step": step - 1} | ({"val_accuracy": curve[step], "val_ci95": 0.012} if step in curve else {})
            for step in range(1, 61)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        began = 1.7e9 + 60 * (number // 2)
        row = {
            "trial": number,
            "status": status,
            "values": {field: values[field] for field in space},
            "accuracy": None if status == "failed" else curve[end],
            "ci95": None if status == "failed" else 0.012,
            "best_step": None if status == "failed" else end,
            "steps": end,
            "tasks": end * 16,
            "seconds": end * (0.4 + 0.05 * steps),
            "losses": int(number == 3),
            "why": "<b>it crashed</b>" if status == "failed" else "",
            "began": began,
            "ended": began + end,
        }
        rows.append(row)
    best = max(rows, key=lambda row: row["accuracy"] or 0.0)
    test = {
        "trial": best["trial"],
        "accuracy": 0.88,
        "ci95": 0.006,
        "tasks": 600,
        "step": 60,
        "manifest_sha256": "ab" * 32,
    }
    found = {
        "name": "<i>sweep</i>",
        "space": space,
        "searcher": {"kind": "random", "seed": 0},
        "scheduler": {"kind": "asha", "grace": 20, "reduction": 3.0},
        "budget": {"trials": trials, "steps": 60, "seconds": None},
        "validation_tasks": 100,
        "fingerprint": "a3" * 32,
        "validation_sha256": "cd" * 32,
        "versions": {"python": "3.11"},
        "best": best["trial"],
        "median_accuracy": 0.8,
        "test": test,
        "trials": rows,
    }
    (folder / "sweep.json").write_text(json.dumps(found))
    (folder / "best.yaml").write_text("name: </pre><b>x</b>\n")
    return folder


def test_the_page_says_it_all_escaped_and_the_same_every_time(tmp_path):
    folder = write_sweep(tmp_path / "sweep")
    page = write_sweep_report(folder).read_text()
    assert write_sweep_report(folder).read_text() == page
    for heading in (
        "Leaderboard",
        "Accuracy over lam and solver.max_iterations",
        "Which field matters",
        "Early stopping",
    ):
        assert f">{heading}<" in page, heading
    assert "<img" not in page and "<i>sweep" not in page and "<b>it crashed" not in page
    assert "&lt;b&gt;it crashed&lt;/b&gt;" in page
    assert "88.0%" in page and "looked at once" in page
    assert page.count("<svg") == 6
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_the_leaderboard_is_ordered_and_the_verdict_counts_what_is_near(tmp_path):
    folder = write_sweep(tmp_path / "sweep")
    found, trials = read_sweep(folder)
    page = write_sweep_report(folder).read_text()
    board = page[page.index('class="board"') : page.index("</table>")]
    numbers = [
        int(row.split("</td>")[0]) for row in board.split('<td class="number">')[1:] if row.split("</td>")[0].isdigit()
    ]
    order = sorted((t for t in trials if t.status != "failed"), key=lambda t: -t.accuracy)
    assert numbers[0] == order[0].number == found["best"]
    assert f"Trial {order[0].number} is ahead of all others by 1.2 points or more." in page
    for row in found["trials"]:
        row["ci95"] = 0.03
    (folder / "sweep.json").write_text(json.dumps(found))
    near = sum(order[0].accuracy - t.accuracy <= 0.03 for t in order[1:])
    assert near > 2
    assert (
        f"Trial {order[0].number} is ahead; {near} others of 14 lie within its 95% interval."
        in write_sweep_report(folder).read_text()
    )


@pytest.mark.parametrize(("trials", "space"), [(1, SPACE), (2, SPACE), (16, {"algorithm.lam": SPACE["algorithm.lam"]})])
def test_what_cannot_be_drawn_is_said(tmp_path, trials, space):
    page = write_sweep_report(write_sweep(tmp_path / "sweep", trials, space)).read_text()
    assert "A surface needs two fields with several values each, and three trials." in page


def test_importance_is_the_share_of_the_variance_that_a_field_predicts(tmp_path):
    _, trials = read_sweep(write_sweep(tmp_path / "sweep", 200))
    measured = [t for t in trials if t.status != "failed"]
    lam, cg, inner = (axis_of(field, SPACE[field], measured) for field in SPACE)
    assert (lam.log, cg.log, inner.names) == (True, True, ["adam lr=0.01", "<img src=x onerror=alert(1)> steps=3"])
    x = np.log10([t.values["algorithm.lam"] for t in measured])
    accuracy = 2.0 - 3.0 * (x - 0.2) ** 2
    assert importance(lam, accuracy) == pytest.approx(1.0)
    assert importance(inner, accuracy) < 0.05
    noise = np.random.default_rng(0).normal(0, 1, len(x))
    expected = 1 - noise.var() / (accuracy + noise).var()
    assert importance(lam, accuracy + noise) == pytest.approx(expected, abs=0.03)
    assert importance(lam, accuracy * 0) is None
    few = axis_of("algorithm.lam", SPACE["algorithm.lam"], measured[:3])
    assert importance(few, accuracy[:3]) is None


def test_each_trial_is_predicted_from_the_others_alone():
    generator = np.random.default_rng(3)
    numbers, places = generator.uniform(0, 1, 9), np.array([0, 0, 0, 1, 1, 1, 1, 2, 1])
    accuracy = generator.normal(0, 1, 9)

    def predicted(by):
        rest = [np.arange(9) != i for i in range(9)]
        errors = [accuracy[i] - by(i, others) for i, others in enumerate(rest)]
        whole = [accuracy[i] - accuracy[others].mean() for i, others in enumerate(rest)]
        return max(0.0, 1 - np.square(errors).sum() / np.square(whole).sum())

    def parabola(i, others):
        return np.polyval(np.polyfit(numbers[others], accuracy[others], 2), numbers[i])

    def mean_of_the_same(i, others):
        same = others & (places == places[i])
        return accuracy[same if same.any() else others].mean()

    accuracy = accuracy + 6 * (numbers - 0.4) ** 2
    axis = axis_of("x", {"kind": "uniform"}, [_Row(float(v)) for v in numbers])
    assert importance(axis, accuracy) == pytest.approx(predicted(parabola))
    accuracy = accuracy + 9 * (places == 1)
    axis = axis_of("x", {"kind": "choice", "values": ["a", "b", "c"]}, [_Row("abc"[p]) for p in places])
    assert 0 < importance(axis, accuracy) == pytest.approx(predicted(mean_of_the_same))


def test_chance_alone_explains_nothing_on_average():
    generator = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        axis = axis_of("x", {"kind": "uniform"}, [_Row(float(v)) for v in generator.uniform(0, 1, 12)])
        shares.append(importance(axis, generator.normal(0, 1, 12)))
    assert np.median(shares) < 0.1


class _Row:
    def __init__(self, value: Any) -> None:
        self.values = {"x": value}


def test_a_folder_without_an_outcome_or_with_a_damaged_one_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no sweep that has ended"):
        write_sweep_report(tmp_path)
    folder = write_sweep(tmp_path / "sweep")
    found = json.loads((folder / "sweep.json").read_text())
    for damage in ({"trials": [{}]}, {"trials": [found["trials"][0] | {"steps": "x"}]}, {"trials": None}):
        (folder / "sweep.json").write_text(json.dumps(found | damage))
        with pytest.raises(InputError, match=r"sweep\.json: a field is missing or of the wrong type"):
            write_sweep_report(folder)
    (folder / "sweep.json").write_text(json.dumps(found | {"trials": []}))
    with pytest.raises(InputError, match="no trial that was validated"):
        write_sweep_report(folder)
