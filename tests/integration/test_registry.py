"""The model registry: a run's best checkpoint as a version that a fresh process loads and that predicts as the learner does."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.command import ROOT, imaml_here
from helpers.runs import write_config

from imaml_dist.distributed.build import make_learner, make_source, open_dataset
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import updates_of

PREDICT = """
import sys, numpy as np, mlflow
given = dict(np.load(sys.argv[2]))
model = mlflow.pyfunc.load_model(sys.argv[1])
for name, params in (("together", None), ("alone", {"inductive": True})):
    found = model.predict(given, params=params)
    np.savez(name + ".npz", **found)
try:
    model.predict(given | {"support_labels": given["support_labels"] + 1})
except Exception as error:
    assert "give one label for each, of 0 to 2" in str(error), error
else:
    raise AssertionError("labels out of range were taken")
"""


@pytest.fixture(scope="module")
def registered(data, tmp_path_factory):
    """A finished run whose best checkpoint is a version."""
    folder = tmp_path_factory.mktemp("registered")
    write_config(folder / "tiny.yaml", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        words = ("--set", "tracking={register: few-shot}", "--set", "algorithm.lam.schedule={to: 0.5, updates: 4}")
        code, output = imaml_here("train", "tiny.yaml", "--run-dir", "runs/a", *words, cwd=folder)
        assert code == 0 and "few-shot version 1: the first champion" in output, output
    return folder


def client_of(folder):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")


def test_a_fresh_process_loads_the_champion_and_gives_the_learners_bits(registered, data, tmp_path):
    run = RunDirectory(registered / "runs" / "a")
    config = run.config()
    source = make_source(config, open_dataset(config), "test")
    episode = source.episodes(0, range(1))
    pixels = {
        name: (x[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for name, x in (("support_images", episode.support_x), ("query_images", episode.query_x))
    }
    np.savez(tmp_path / "given.npz", **pixels, support_labels=episode.support_y[0].numpy())
    (tmp_path / "predict.py").write_text(PREDICT)
    environment = {
        "PATH": os.environ["PATH"],
        "IMAML_KERNELS": os.environ["IMAML_KERNELS"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{registered / 'runs' / 'mlflow.db'}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "predict.py", "models:/few-shot@champion", "given.npz"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr

    tensors, facts = checkpoints.load(checkpoints.path_of(run.checkpoints, run.best_checkpoint()))
    learner = make_learner(config, source.image_shape, updates_of(facts))
    assert learner.algorithm.strength.init > 0.1  # as scheduled
    meta_parameters(learner).load(tensors)
    with torch.no_grad():
        logits = learner.adapt(episode.support_x[0], episode.support_y[0])(episode.query_x[0])
        phi = learner.adapt_parameters(episode.support_x, episode.support_y).params
        alone = learner.functional.predict_inductive(phi, episode.support_x, episode.query_x)[0]
    for name, expected in (("together", logits), ("alone", alone)):
        found = np.load(tmp_path / f"{name}.npz")
        assert np.array_equal(found["logits"], expected.numpy()), name
        assert np.array_equal(found["labels"], expected.argmax(-1).numpy())


def test_a_version_is_files_without_pickle_and_says_where_it_comes_from(registered):
    client = client_of(registered)
    version = client.get_model_version_by_alias("few-shot", "champion")
    summary = json.loads((registered / "runs" / "a" / "summary.json").read_text())
    assert float(version.tags["test_accuracy"]) == summary["test_accuracy"]
    assert version.tags["dataset_fingerprint"] == summary["dataset"]["fingerprint"]
    assert version.run_id == summary["mlflow"]["run_id"]
    folder = next((registered / "runs" / "mlartifacts").rglob("MLmodel")).parent
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.yaml", "facts.json", "served.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert "optimizer" not in (next(folder.rglob("model.safetensors")).read_bytes()[:20_000]).decode(errors="ignore")


def test_only_a_better_one_of_the_same_problem_becomes_champion(registered, tmp_path):
    from imaml_dist.distributed.adapted import CODE, write_files
    from imaml_dist.tracking.mlflow_link import MlflowLink
    from imaml_dist.tracking.mlflow_model import ModelFacts, register

    run = RunDirectory(registered / "runs" / "a")
    link, step = MlflowLink(run.path), run.best_checkpoint()
    files = write_files(run, step, (1, 28, 28), tmp_path)
    images, labels = np.zeros((3, 28, 28, 1), np.uint8), np.arange(3)
    example = {"support_images": images, "support_labels": labels, "query_images": images}
    on = {"dataset_fingerprint": "f" * 64}
    facts = ModelFacts("other", CODE, files, (28, 28, 1), 3, example, step, 0.5, on)
    assert register(link, facts) == "other version 1: the first champion"
    assert register(link, facts) == "other version 1: the champion"
    tie = register(link, replace(facts, step=step + 1))
    assert tie == "other version 2: version 1 stays champion with 50.00% against 50.00%"
    foreign = register(link, replace(facts, step=step + 2, accuracy=0.9, tested_on={"dataset_fingerprint": "e" * 64}))
    assert (
        "version 3: not compared with the champion, version 1, which was tested on another dataset_fingerprint"
        in foreign
    )
    better = register(link, replace(facts, step=step + 3, accuracy=0.6))
    assert better == "other version 4: the new champion with 60.00%, after version 1 with 50.00%"
    assert str(client_of(registered).get_model_version_by_alias("other", "champion").version) == "4"


def test_a_finished_run_is_registered_when_that_is_asked_for_later(data, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_config(tmp_path / "tiny.yaml", data)
    train, starts = ("train", "tiny.yaml", "--run-dir", "runs/a"), tmp_path / "runs" / "a" / "starts.jsonl"
    assert imaml_here(*train, cwd=tmp_path)[0] == 0
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    for section, says in (
        ("{mlflow: true}", None),  # all of it becomes an MLflow run
        ("{register: late}", "late version 1: the first champion"),
        ("{register: late}", None),
        ("{register: other}", "other version 1: the first champion"),
    ):
        code, output = imaml_here(*train, "--set", f"tracking={section}", cwd=tmp_path)
        assert code == 0 and "is finished" in output, output
        assert (says in output) if says else ("version" not in output), output
    assert len(starts.read_text().splitlines()) == 1
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    found = client_of(tmp_path).get_run(summary["mlflow"]["run_id"])
    assert found.info.status == "FINISHED" and found.data.metrics["test/accuracy"] == summary["test_accuracy"]
    assert len(client_of(tmp_path).get_metric_history(found.info.run_id, "meta/loss")) == 6


def test_what_cannot_be_compared_is_not_registered(data, tmp_path):
    write_config(tmp_path / "tiny.yaml", data)
    for words, says in (
        (("--set", "tracking={register: a/b}"), "tracking.register: 'a/b' given"),
        (("--set", "tracking.register=x"), "tracking.register: 'x' given with tracking.mlflow: false"),
        (("--set", "tracking={register: x}", "--set", "evaluate.tasks=0"), "given with evaluate.tasks = 0"),
    ):
        code, output = imaml_here("train", "tiny.yaml", *words, cwd=tmp_path)
        assert code == 2 and says in output, output
