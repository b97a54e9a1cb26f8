"""The shipped sweep over lambda and CG steps on the embedded data: what it finds is worth having."""

import json
import statistics

import pytest
from helpers.command import ROOT, imaml

from pipelines.evaluate import evaluate_run


@pytest.mark.slow
def test_the_best_trial_beats_the_median_and_is_as_good_as_what_is_shipped(tmp_path, monkeypatch):
    """On the frozen test tasks, which no trial was chosen by; trial 0 has the shipped values."""
    code, output = imaml("prepare", "glyphs", "--out", "data/glyphs", cwd=tmp_path, timeout=600)
    assert code == 0, output
    file = ROOT / "pipelines" / "configs" / "sweep_lambda_cg.yaml"
    words = (
        "sweep",
        str(file),
        "--set",
        "budget.trials=8",
        "--set",
        "base.tracking.mlflow=false",
        "--sweep-dir",
        "sweep",
    )
    code, output = imaml(*words, cwd=tmp_path, timeout=2400)
    assert code == 0, output
    folder = tmp_path / "sweep"
    found = json.loads((folder / "sweep.json").read_text())
    rows = found["trials"]
    assert [row["status"] for row in rows] == ["finished"] * 8
    median = statistics.median(row["accuracy"] for row in rows)
    assert found["median_accuracy"] == median < rows[found["best"]]["accuracy"]
    monkeypatch.chdir(tmp_path)  # the data lie where the configuration says, seen from there
    manifest = str(folder / "test.jsonl")
    middle = min(rows, key=lambda row: (abs(row["accuracy"] - median), row["trial"]))["trial"]
    best, shipped, other = (
        evaluate_run(folder / "trials" / f"{number:04d}", manifest=manifest) for number in (found["best"], 0, middle)
    )
    assert best["accuracy"] == found["test"]["accuracy"]
    assert best["accuracy"] + best["ci95"] >= shipped["accuracy"] - shipped["ci95"]
    assert best["accuracy"] > other["accuracy"]
