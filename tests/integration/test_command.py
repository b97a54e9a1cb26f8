"""The command line as a user meets it: exit codes, one sentence for every mistake, and a whole run without Ray."""

import hashlib
import json
import math
import re
import signal
import sqlite3
import time
from contextlib import closing
from importlib.metadata import version

import pytest
import torch
import yaml
from helpers.command import Command, imaml, imaml_here, wait_for_step
from helpers.datasets import write_blobs
from helpers.kernels import NATIVE
from helpers.runs import fingerprint, tiny, train_alone, write_config

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.prepare import glyphs
from imaml_dist.distributed.build import make_learner
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished local run, made by the command itself."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "tiny.yaml", data)
    code, output = imaml("train", str(config), "--run-dir", "run", cwd=folder)
    assert code == 0, output
    return folder, output


def test_a_local_run_leaves_everything_it_promises(finished, data, tmp_path):
    folder, output = finished
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("algorithm", "dataset", "way", "shot", "meta_steps", "test_accuracy", "ci95", "tasks_evaluated"):
        assert summary[key] is not None, key
    for key in ("tasks_per_second", "world_size", "restarts", "skipped_tasks", "params_sha256", "versions"):
        assert summary[key] is not None, key
    assert summary["test_accuracy_inductive"] is not None and summary["ci95_inductive"] is not None
    assert (summary["warm_start"], summary["skipped_steps"]) == (None, 0)
    assert "test accuracy (20 tasks)" in output
    assert "the same, inductive" in output
    assert "each query image alone, with statistics from the support set" in output
    assert (run / "report.html").stat().st_size > 10_000
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("meta_loss", "query_accuracy", "cg_residual", "stationarity", "distance", "cosine", "accepted"):
        assert isinstance(record[key], float | int), key
    for key in ("tasks_per_second", "seconds_data", "seconds_inner", "seconds_solve", "seconds_reduce"):
        assert record[key] >= 0, key
    assert fingerprint(run) == train_alone(tiny(data), tmp_path / "library")


def test_finished_runs_are_not_repeated_and_fresh_ones_are(finished, data, tmp_path):
    folder, _ = finished
    before = (folder / "run" / "starts.jsonl").read_text()
    code, output = imaml_here("train", "tiny.yaml", "--run-dir", "run", cwd=folder)
    assert code == 0
    assert "is finished" in output
    assert (folder / "run" / "starts.jsonl").read_text() == before


def test_evaluate_agrees_with_the_run_and_writes_json(finished):
    folder, _ = finished
    code, output = imaml("evaluate", "run", "--tasks", "20", "--json", "e.json", cwd=folder)
    assert code == 0, output
    result = json.loads((folder / "e.json").read_text())
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert result["accuracy"] == summary["test_accuracy"]
    assert len(result["per_task"]) == len(result["per_task_inductive"]) == 20
    assert result["accuracy_inductive"] == summary["test_accuracy_inductive"]
    assert "accuracy, inductive" in output
    assert imaml_here("evaluate", "run", "--split", "val", "--tasks", "5", cwd=folder)[0] == 0


def test_frozen_tasks_are_evaluated_as_the_run_itself_would(finished, data, tmp_path):
    folder, _ = finished
    freeze = (
        "freeze-tasks",
        str(folder / "tiny.yaml"),
        "--tasks",
        "20",
        "--out",
        str(tmp_path / "sets" / "tasks.jsonl"),
    )
    code, output = imaml_here(*freeze, cwd=tmp_path)
    assert code == 0 and "20 tasks of the test split, sha256" in output, output
    code, output = imaml_here(*freeze, cwd=tmp_path)
    assert code == 0 and "it is there already" in output, output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    evaluate = ("evaluate", str(folder / "run"), "--manifest", "sets/tasks.jsonl")
    code, output = imaml_here(*evaluate, "--tasks", "20", "--json", "e.json", cwd=tmp_path)
    assert code == 0, output
    result = json.loads((tmp_path / "e.json").read_text())
    assert (result["accuracy"], result["tasks"], result["split"]) == (summary["test_accuracy"], 20, "test")
    content = (tmp_path / "sets" / "tasks.jsonl").read_bytes()
    assert result["manifest_sha256"] == hashlib.sha256(content).hexdigest()
    other = write_config(tmp_path / "other.yaml", data)
    set_way = ("--set", "data.way=4", "--set", "data.pool=4", "--tasks", "5", "--split", "train")
    assert imaml_here("freeze-tasks", str(other), *set_way, "--out", "four.jsonl", cwd=tmp_path)[0] == 0
    for words, says in (
        ((*freeze[:2], "--tasks", "21", *freeze[4:]), "is there already and holds something else"),
        ((*freeze[:2], "--split", "dev", *freeze[4:]), "the split is one of train, val, test"),
        ((*evaluate, "--split", "val"), "the manifest has 20 tasks of the test split and is used as a whole"),
        ((*evaluate[:3], "four.jsonl"), "its tasks have 4 classes, the run's model tells 3 apart"),
        ((*evaluate[:3], "none.jsonl"), "there is no manifest"),
    ):
        code, output = imaml_here(*words, cwd=tmp_path)
        assert (code, says in output, len(output.strip().splitlines())) == (2, True, 1), output


def test_report_can_be_written_again(finished):
    folder, _ = finished
    page = (folder / "run" / "report.html").read_bytes()
    (folder / "run" / "report.html").unlink()
    code, output = imaml_here("report", "run", cwd=folder)
    assert (code, output.strip()) == (0, "run/report.html")
    assert (folder / "run" / "report.html").read_bytes() == page


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded data set, three scripts of it: all take ten seconds to draw."""
    folder = tmp_path_factory.mktemp("embedded") / "glyphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "SCRIPTS", {"train": ("GEORGIAN",), "val": ("ARMENIAN",), "test": ("LAO",)})
        patch.setattr(glyphs, "TRAIN_BLOCKS", ())
        code, output = imaml_here("prepare", "glyphs", "--out", str(folder), cwd=folder.parent)
    assert code == 0, output
    return folder


@pytest.mark.parametrize("kind", ["imaml", "maml", "fomaml", "reptile", "anil", "meta_sgd"])
def test_every_algorithm_trains_by_one_switch(embedded, tmp_path, kind):
    config = write_config(tmp_path / "tiny.yaml", embedded, steps=2, tasks_per_step=4)
    few = ("--set", "validate.tasks=0", "--set", "evaluate.tasks=6")
    switch = ("--set", f"algorithm.kind={kind}")
    code, output = imaml_here("train", str(config), *switch, *few, "--run-dir", "run", cwd=tmp_path)
    assert code == 0, output
    assert "test accuracy (6 tasks)" in output
    assert (tmp_path / "run" / "report.html").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["algorithm"], summary["meta_steps"], summary["skipped_tasks"]) == (kind, 2, 0)
    assert summary["dataset"]["name"] == "glyphs"
    assert 0 <= summary["test_accuracy"] <= 1 and math.isfinite(summary["ci95"])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["query_accuracy"]) and record["accepted"] == 4 for record in records)
    start = make_learner(RunDirectory(tmp_path / "run").config(), Dataset(str(embedded)).index.image_shape)
    tensors, _ = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    for name, value in meta_parameters(start).tensors().items():
        # Before batch normalisation a bias has no gradient but rounding errors.
        assert ("blocks" in name and name.endswith("0.bias")) or not torch.equal(tensors[name], value), name


def test_a_learned_strength_is_seen_everywhere(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=3, tasks_per_step=4)
    learned = "algorithm.lam={kind: diagonal, init: 0.3, learn: true, lr: 0.05}"
    words = [x for o in (learned, "validate.tasks=0", "evaluate.tasks=6", "tracking.mlflow=true") for x in ("--set", o)]
    code, output = imaml_here("train", str(config), *words, "--run-dir", "runs/a", cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "a"
    tensors, _ = checkpoints.load_newest(run / "checkpoints")
    strengths = tensors["algorithm.lam.log_strengths"].exp()
    assert strengths.shape == (sum(t.numel() for name, t in tensors.items() if name.startswith("model.")),)
    assert 0.2 < strengths.min() < 0.3 < strengths.max() < 0.4

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as store:
        for name, of in {"min": torch.min, "median": torch.median, "max": torch.max}.items():
            series = [record[f"algorithm_lam_{name}"] for record in records]
            assert series[-1] == pytest.approx(float(of(strengths)), rel=1e-6)
            query = "select step, value from metrics where key = ? order by step"
            assert store.execute(query, [f"algorithm/lam_{name}"]).fetchall() == list(enumerate(series))
    page = (run / "report.html").read_text()
    assert "What the algorithm learned" in page
    assert f"medians are lam {records[-1]['algorithm_lam_median']:.3g}." in " ".join(page.split())


def test_other_models_and_operators_run_by_one_switch(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=2)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(image_shape, way, width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.Tanh(), nn.Linear(width, way))\n"
    )
    for name, override in {
        "hessian": "algorithm.solver.operator=hessian",
        "loop": "run.execution=loop",
        "mlp": "model={kind: mlp, hidden: [16]}",
        "own": "model={kind: 'mine:make', width: 8}",
    }.items():
        code, output = imaml_here("train", str(config), "--set", override, "--run-dir", name, cwd=tmp_path)
        assert code == 0, output
        assert (tmp_path / name / "report.html").is_file()


@NATIVE
def test_without_a_compiler_torchs_kernels_are_used_and_it_is_said(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=1)
    for name, compiler in {"with": {}, "without": {"CXX": "no-such-compiler"}}.items():
        code, output = imaml("train", str(config), "--run-dir", name, cwd=tmp_path, **compiler)
        assert code == 0, output
        assert ("there is no C++ compiler 'no-such-compiler'" in output) == bool(compiler)
        resolved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert resolved["run"]["execution"] == ("vmap" if compiler else "native")
    code, output = imaml("evaluate", "with", "--tasks", "5", cwd=tmp_path, CXX="no-such-compiler")
    assert (code, "torch's own kernels are used" in output) == (0, True), output
    insist = ("--set", "run.execution=native")
    code, output = imaml("train", str(config), *insist, "--run-dir", "x", cwd=tmp_path, CXX="no-such-compiler")
    assert (code, len(output.strip().splitlines())) == (3, 1), output


def test_a_run_that_begins_warm_says_with_what(data, tmp_path, finished):
    folder, _ = finished
    source = json.loads((folder / "run" / "summary.json").read_text())
    config = write_config(tmp_path / "tiny.yaml", data, steps=2)
    (tmp_path / "other").symlink_to(folder / "run")
    assert imaml_here("train", str(config), "--set", "warm_start.path=other", "--run-dir", "run", cwd=tmp_path)[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["warm_start"]["path"] == "other"
    if source["best_step"] == source["meta_steps"]:
        assert summary["warm_start"]["sha256"] == source["params_sha256"]
    assert summary["untrained_accuracy"] == source["untrained_accuracy"]
    assert "warm start" in (tmp_path / "run" / "report.html").read_text()
    for overrides, says in (
        (
            ["data.way=4"],
            "'head.weight' in shape (3, 32), this model in (4, 32); give a source of the same model, or name",
        ),
        (["warm_start.skip=[haed]"], "warm_start.skip: 'haed' names no tensor"),
        (["warm_start.path=run"], "warm_start.path: run lies in the run's own directory run"),
    ):
        words = [x for o in ("warm_start.path=other", *overrides) for x in ("--set", o)]
        code, output = imaml_here("train", str(config), *words, "--run-dir", "run", "--fresh", cwd=tmp_path)
        assert code == 2, output
        assert says in output
        assert len(output.strip().splitlines()) == 1, output
    assert (tmp_path / "run" / "summary.json").is_file(), "nothing was deleted for a mistake"


def test_the_version_is_the_packages(tmp_path):
    assert imaml_here("--version", cwd=tmp_path) == (0, f"imaml {version('imaml_dist')}\n")


def test_ctrl_c_ends_with_130_and_a_checkpoint_and_the_same_command_resumes_to_the_same_bits(data, tmp_path):
    run = {"steps": 25, "checkpoint_every": 20}
    config = write_config(tmp_path / "tiny.yaml", data, **run)
    with Command("train", str(config), "--run-dir", "run", cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, command)
        command.kill(signal.SIGINT)
        assert command.wait() == 130, command.output
    assert "the same command goes on from the last checkpoint" in command.output
    code, output = imaml("train", str(config), "--run-dir", "run", cwd=tmp_path)
    assert code == 0, output
    assert int(re.findall(r"meta-training tiny: (\d+)/25", output)[0]) > 2, "it is shown where it goes on"
    assert fingerprint(tmp_path / "run") == train_alone(tiny(data, **run), tmp_path / "gold")


def test_a_second_signal_is_obeyed_at_once_even_if_the_run_directory_is_gone(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=100_000, checkpoint_every=100_000)
    never = ("--set", "validate.every=100000")  # a best state would be saved, and make the directory again
    with Command("train", str(config), "--run-dir", "run", *never, cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, command)
        (tmp_path / "run").rename(tmp_path / "gone")  # at once, whatever is being written
        command.kill(signal.SIGINT)
        while "once more to stop at once" not in command.process.stdout.readline():
            assert command.process.poll() is None, "nothing else comes of it, for there is nowhere to ask the loop"
        command.kill(signal.SIGINT)
        assert command.wait(10) == 130, command.output
    assert "stopped at once" in command.output


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run.stepps=3"], "run.stepps: is not a known field; did you mean run.steps?"),
        (["algorithm.lam=0"], "algorithm.lam: 0 given, should be greater than 0"),
        (["algorithm.adapts=[tail]"], "algorithm.adapts: 'tail' is no parameter and begins none; there are "),
        (
            ["algorithm={kind: anil, head: [tail]}"],
            "algorithm.head: 'tail' is no parameter and begins none; there are ",
        ),
        (["data.url=nowhere"], "data.url: nowhere has no index.json"),
        (["data.way=9"], "data.way: 9 classes per episode, but the val split"),
        (["data.url=gs://bucket/x"], "scheme 'gs' is not supported"),
        (["data.url=s3://id:secret@bucket"], "credentials do not belong in a URL"),
        (["run.device=cuda"], "run.device: cuda given"),
        (["warm_start.path=nowhere"], "warm_start.path: there is no nowhere"),
        (["warm_start.path=runs/tiny/a"], "lies in the run's own directory runs/tiny; choose another --run-dir"),
        (["outer.momentum=0.9"], "outer.momentum: 0.9 given, but 'adam' has no momentum"),
        (["model={kind: 'no.such:thing'}"], "model.kind: 'no.such:thing' cannot be used"),
        (["model={kind: 'torch.nn:Flatten'}"], "model.kind: 'torch.nn:Flatten' cannot be used"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2_before_anything_starts(data, tmp_path, overrides, says):
    config = write_config(tmp_path / "tiny.yaml", data, backend="ray")
    began = time.monotonic()
    code, output = imaml_here("train", str(config), *(x for o in overrides for x in ("--set", o)), cwd=tmp_path)
    assert code == 2, output
    assert says in output
    assert len(output.strip().splitlines()) == 1, output
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - began < 30, "nothing may be started for it"


def test_a_truncated_shard_is_one_sentence_and_exit_code_2(tmp_path):
    write_blobs(tmp_path / "blobs")
    shard = next((tmp_path / "blobs").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-700])
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "blobs")
    damage = {"train": f"{shard.name} is", "verify": f"shard {shard.name}, bytes"}
    for args in (("train", str(config)), ("verify", str(tmp_path / "blobs"))):
        code, output = imaml_here(*args, cwd=tmp_path)
        assert code == 2
        assert damage[args[0]] in output
        assert "Traceback" not in output


def test_verify_accepts_what_is_whole(data, tmp_path):
    code, output = imaml_here("verify", str(data), cwd=tmp_path)
    assert code == 0
    assert "3 shards with 28 classes verify" in output


def test_two_commands_do_not_train_in_one_directory(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=10_000)
    with Command("train", str(config), "--run-dir", "run", cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 1, command)
        code, output = imaml_here("train", str(config), "--run-dir", "run", "--fresh", cwd=tmp_path)
        assert code == 2
        assert "is being trained by another imaml train" in output
        assert command.process.poll() is None
        command.kill(signal.SIGTERM)
        assert command.wait() == 130


def test_fresh_deletes_what_a_run_wrote_and_nothing_else(data, tmp_path):
    config = write_config(tmp_path / "config.yaml", data, steps=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    code, output = imaml_here("train", str(config), "--run-dir", ".", "--fresh", cwd=tmp_path)
    assert code == 2
    assert "holds no run (it holds 'thesis')" in output
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_paths_that_are_not_what_they_should_be(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data, steps=1)
    (tmp_path / "file").write_text("")
    for args in (
        ("train", str(config), "--run-dir", "file/x"),
        ("prepare", "omniglot", "--out", "file", "--source", "file"),
    ):
        code, output = imaml_here(*args, cwd=tmp_path)
        assert code == 2, output
        assert len(output.strip().splitlines()) == 1, output


def test_a_network_or_loss_that_does_not_fit_is_refused_before_anything_starts(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Noisy(nn.Module):\n"
        "    def __init__(self): super().__init__(); self.l = nn.Linear(784, 3)\n"
        "    def forward(self, x): return self.l(x.flatten(1)) + torch.randn(())\n"
        "def noisy(image_shape, way): return Noisy()\n"
        "def wrong(image_shape, way): return nn.Linear(5, way)\n"
        "def raising(outputs, labels): raise ValueError('two\\nlines')\n"
        "def over_tasks(outputs, labels): return outputs.mean()\n"
    )
    for override, says in {
        "model={kind: 'mine:noisy'}": "model.kind: layer '(root)' (Noisy) gives different outputs for the same input",
        "model={kind: 'mine:wrong'}": "model.kind: the network cannot be meta-trained",
        "loss=mine:raising": "cannot be computed (ValueError: two lines)",
        "loss=mine:over_tasks": "should be a tensor of shape (2,): the mean over the samples of each task",
    }.items():
        code, output = imaml_here("train", str(config), "--set", override, cwd=tmp_path)
        assert (code, says in " ".join(output.split())) == (2, True), output
        assert len(output.strip().splitlines()) == 1, output


def test_other_mistakes_with_run_directories(data, tmp_path, finished):
    folder, _ = finished
    code, output = imaml_here("train", "tiny.yaml", "--set", "run.seed=3", "--run-dir", "run", cwd=folder)
    assert (code, "run.seed: 3 given" in output) == (2, True)
    for args in (("report", "nowhere"), ("evaluate", "nowhere"), ("mlflow-sync", "nowhere"), ("train", "none.yaml")):
        code, output = imaml_here(*args, cwd=tmp_path)
        assert code == 2, args
        assert len(output.strip().splitlines()) == 1, output
    code, output = imaml_here("evaluate", "run", "--split", "dev", cwd=folder)
    assert (code, "train, val, test" in output) == (2, True)
