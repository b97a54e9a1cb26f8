"""`imaml train --seeds` and `imaml report RUN RUN`: several runs of one kind, through an interruption, and what they come to."""

import json
import math
import signal

import pytest
from helpers.command import Command, imaml_here, wait_for_step
from helpers.runs import fingerprint, tiny, train_alone, write_config

TRACKED = ("--set", "tracking.mlflow=true")


def test_repeats_are_resumed_and_become_children_of_one_run(data, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_config(tmp_path / "tiny.yaml", data, seed=3)
    words = ("train", "tiny.yaml", "--seeds", "2", "--run-dir", "runs/both", *TRACKED, "--set", "run.steps=200")
    runs = [tmp_path / "runs" / "both" / f"seed-{seed}" for seed in (3, 4)]
    with Command(*words, cwd=tmp_path) as command:
        wait_for_step(runs[0] / "metrics.jsonl", 3, command)
        command.kill(signal.SIGINT)
        assert command.wait() == 130, command.output
    assert not runs[1].exists()
    stopped_at = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 1
    assert stopped_at < 200
    words = (*words[:-1], f"run.steps={stopped_at + 2}")
    code, output = imaml_here(*words, cwd=tmp_path)
    assert code == 0, output
    assert "mean of 2" in output and "seed 3" in output

    result = json.loads((tmp_path / "runs" / "both" / "seeds.json").read_text())
    accuracies = [json.loads((run / "summary.json").read_text())["test_accuracy"] for run in runs]
    assert [one["test_accuracy"] for one in result["seeds"]] == accuracies
    spread = result["spread"]["test_accuracy"]
    assert spread["mean"] == pytest.approx(sum(accuracies) / 2)
    assert spread["sd"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / math.sqrt(2))
    assert spread["ci95"] == pytest.approx(12.7062 * spread["sd"] / math.sqrt(2), rel=1e-4)
    alone = train_alone(tiny(data, seed=4, steps=stopped_at + 2), tmp_path / "alone")
    assert fingerprint(runs[1])["params"] == alone["params"]
    assert "seed-3" in (tmp_path / "runs" / "both" / "report.html").read_text()

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    found = client.search_runs([experiment])
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    children = [one for one in found if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {parent.info.run_id}
    assert sorted(one.data.params["run.seed"] for one in children) == ["3", "4"]
    assert {one.info.status for one in found} == {"FINISHED"}
    assert parent.data.metrics["test_accuracy/mean"] == pytest.approx(spread["mean"])
    (resumed,) = [one for one in children if one.data.params["run.seed"] == "3"]
    assert resumed.data.tags["resume_count"] == "1"
    assert resumed.data.tags["now.run.steps"] == str(stopped_at + 2)
    steps = [m.step for m in client.get_metric_history(resumed.info.run_id, "meta/loss")]
    assert steps == list(range(stopped_at + 2))
    figures = {a.path for a in client.list_artifacts(resumed.info.run_id, "figures")}
    assert {"figures/learning-curve.png", "figures/episode.png", "figures/cg-residual.png"} <= figures


def test_what_is_no_repeats_is_left_alone(data, tmp_path):
    write_config(tmp_path / "tiny.yaml", data)
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "config.yaml").write_text("name: x\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for folder, says in (("single", "holds a single run"), ("other", "holds no repeats (it holds 'thesis.tex')")):
        code, output = imaml_here("train", "tiny.yaml", "--seeds", "2", "--run-dir", folder, cwd=tmp_path)
        assert code == 2 and says in output, output
    code, output = imaml_here("train", "tiny.yaml", "--seeds", "2", "--set", f"run.seed={2**63 - 1}", cwd=tmp_path)
    assert code == 2 and "the last seed is above" in output, output
