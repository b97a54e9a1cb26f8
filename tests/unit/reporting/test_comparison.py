"""The page that compares runs: one escaped page, the best first, and only what differs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from imaml_dist.errors import InputError
from imaml_dist.reporting.comparison import write_comparison


def write_run(path: Path, accuracy: float | None, seed: int = 0, way: int = 5, lam: float = 0.1) -> Path:
    path.mkdir(parents=True)
    config = f"name: demo\ndata: {{way: {way}}}\nrun: {{seed: {seed}}}\nalgorithm: {{lam: {lam}}}\n"
    (path / "config.yaml").write_text(config)
    records = [
        {"step": s, "query_accuracy": 1 - 0.8 * math.exp(-s / 20), "seconds_step": 0.5, "val_accuracy": 0.8 if s % 10 == 9 else None}
        for s in range(40)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if accuracy is not None:
        summary = {
            "name": "demo", "algorithm": "imaml", "dataset": {"name": "glyphs"}, "way": way, "shot": 1, "meta_steps": 40,
            "test_accuracy": accuracy, "ci95": 0.01, "seconds": 20.0, "tasks_per_second": 32.0,
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_the_best_run_comes_first_and_differences_are_those_of_the_configurations(tmp_path):
    runs = [
        write_run(tmp_path / "a", 0.90),
        write_run(tmp_path / "b", 0.95, seed=1, lam=2.0),
        write_run(tmp_path / "c", 0.945),
    ]
    runs.append(write_run(tmp_path / "unfinished", None))
    page = write_comparison(runs, tmp_path / "out" / "page.html").read_text()
    order = [page.index(f"</span>{name}<") for name in ("b", "c", "a", "unfinished")]
    assert order == sorted(order)
    assert "5.0 points <small>disjoint" in page and "0.5 points <small>overlap" in page
    table = page[page.index("Differences of configuration") :]
    assert re.findall(r'<th scope="row">([^<]+)</th>', table) == ["algorithm.lam", "run.seed"]
    assert "2.0" in table
    assert "40 of 2000" in page
    assert "different problems" not in page
    assert page.count("<svg") == 2
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_runs_of_different_problems_are_said_to_be_so(tmp_path):
    runs = [write_run(tmp_path / "a", 0.9), write_run(tmp_path / "b", 0.8, way=20)]
    assert "different problems" in write_comparison(runs, tmp_path / "page.html").read_text()


def test_names_are_as_long_as_needed_and_escaped(tmp_path):
    runs = [write_run(tmp_path / "<i>x" / "run", 0.9), write_run(tmp_path / "y" / "run", 0.8)]
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "&lt;i&gt;x/run" in page and "y/run" in page and "<i>x" not in page
    assert page == write_comparison(runs, tmp_path / "page.html").read_text()


def test_what_is_no_run_is_refused(tmp_path):
    run = write_run(tmp_path / "a", 0.9)
    with pytest.raises(InputError, match="is not a run directory"):
        write_comparison([run, tmp_path], tmp_path / "page.html")
    with pytest.raises(InputError, match="given twice"):
        write_comparison([run, tmp_path / "b" / ".." / "a"], tmp_path / "page.html")


def test_a_run_without_a_step_has_its_place(tmp_path):
    runs = [write_run(tmp_path / "a", 0.9), write_run(tmp_path / "b", None)]
    (runs[1] / "metrics.jsonl").unlink()
    assert "0 of 2000" in write_comparison(runs, tmp_path / "page.html").read_text()
