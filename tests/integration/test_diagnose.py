"""`imaml diagnose` on runs that the command itself trained: what it prints, what it writes, and what it refuses."""

import json
import math

import pytest
from helpers.command import imaml, imaml_here
from helpers.runs import write_config

from imaml_dist.training.diagnosis import Reference
from pipelines.diagnose import LEFT_OUT

SMOOTH = (
    "from torch import nn\n"
    "def make(image_shape, way):\n"
    "    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 6), nn.Tanh(), nn.Linear(6, way))\n"
)
EXACT = (
    "model={kind: 'mine:make'}",
    "algorithm.lam=0.5",
    "algorithm.inner={kind: newton_cg, steps: 40, cg_iterations: 60, operator: hessian, tolerance: 1.0e-8}",
    "algorithm.solver={kind: conjugate_gradient, operator: hessian, max_iterations: 100, rtol: 1.0e-8}",
)
ADAPTING = ("algorithm.solver.adapt={residual: 1.0e-12, every: 1, most: 9}", "model={kind: 'mine:make'}")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A folder with small runs of float32: one solved exactly, one whose iterations adapt, one of first-order MAML."""
    folder = tmp_path_factory.mktemp("diagnosed")
    (folder / "mine.py").write_text(SMOOTH)
    config = write_config(folder / "tiny.yaml", data, steps=4, tasks_per_step=4)
    few = ("validate.tasks=0", "evaluate.tasks=4")
    for name, overrides in {"exact": EXACT, "adapting": ADAPTING, "first": ("algorithm.kind=fomaml",)}.items():
        words = [word for override in (*few, *overrides) for word in ("--set", override)]
        code, output = imaml_here("train", str(config), *words, "--run-dir", name, cwd=folder)
        assert code == 0, output
        assert ("is the implicit gradient one?" in output) == (name != "first")
    return folder


def test_a_run_solved_exactly_has_the_implicit_gradient(folder):
    code, output = imaml("diagnose", "exact", "--tasks", "3", "--json", "d.json", cwd=folder)
    assert code == 0, output
    assert "diagnosing tiny on test: 3/3" in output
    result = json.loads((folder / "d.json").read_text())
    assert output.splitlines()[-1] == result["verdict"]
    assert result["verdict"].startswith("stationarity <= 0.05 on 100% of tasks; H + Lambda positive definite on 100%")
    assert result["verdict"].endswith("this is the implicit gradient.")
    head = {key: result[key] for key in ("split", "tasks", "step", "lanczos_steps", "directions")}
    assert head == {"split": "test", "tasks": 3, "step": 4, "lanczos_steps": 50, "directions": 4}
    assert [task["task"] for task in result["per_task"]] == [0, 1, 2]
    for task in result["per_task"]:
        assert task["reference"] == "compared" and task["error"] < 1e-5 and task["difference_error"] < 1e-5
        assert task["smallest"] > 0 and task["gauss_newton_smallest"] == pytest.approx(0.5, rel=1e-6)
        assert task["stationarity"] <= 1e-8, "in float64, whatever the run itself was trained in"
    assert result["summary"]["counts"]["references"]["compared"] == 3
    assert "H + Lambda: positive definite 3, not positive definite 0, undecided 0" in output
    assert "relative error of the meta-gradient" in output and "linear solves ended by: converged 3" in output


def test_every_reason_to_leave_a_task_out_has_a_sentence():
    assert set(LEFT_OUT) == set(Reference) - {Reference.COMPARED} and len(set(LEFT_OUT.values())) == len(LEFT_OUT)


def test_it_is_the_same_again_and_takes_a_split_of_ones_choice(folder):
    words = ("diagnose", "exact", "--tasks", "1", "--split", "val", "--json")
    for name in ("a.json", "b.json"):
        code, output = imaml_here(*words, name, cwd=folder)
        assert code == 0, output
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    assert json.loads((folder / "a.json").read_text())["split"] == "val"


def test_the_run_is_diagnosed_with_the_iterations_that_it_had_come_to(folder):
    code, output = imaml_here("diagnose", "adapting", "--tasks", "1", "--json", "d.json", cwd=folder)
    assert code == 0, output
    records = [json.loads(line) for line in (folder / "adapting" / "metrics.jsonl").read_text().splitlines()]
    (task,) = json.loads((folder / "d.json").read_text())["per_task"]
    assert records[0]["algorithm_cg_steps"] == 2 and records[-1]["algorithm_cg_steps"] == 5
    assert task["iterations"] == 6
    assert math.isfinite(task["error"]) and task["error"] > 1e-4


def test_what_cannot_be_diagnosed_is_one_sentence_and_exit_code_2(folder):
    for words, says in (
        (("first",), "first is a run of fomaml, which solves no linear system and so has no implicit gradient to diagnose; give"),
        (("nowhere",), "nowhere"),
        (("exact", "--tasks", "0"), "--split test --tasks 0: the split is one of train, val, test, and tasks is at least 1"),
        (("exact", "--split", "dev"), "--split dev"),
    ):  # fmt: skip
        code, output = imaml_here("diagnose", *words, cwd=folder)
        assert (code, says in output, len(output.strip().splitlines())) == (2, True, 1), output
