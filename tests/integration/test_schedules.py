"""Schedules within a run: the values of every step, and the same bits through a resume in the middle and on more workers."""

import json

import pytest
from helpers.gloo import run_group
from helpers.runs import fingerprint, raw_config, tiny, train_alone, train_in_a_group

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import resolve
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory

LAM = {"init": 0.1, "schedule": {"kind": "cosine", "to": 2.0, "updates": 6}}
ADAPT = {"residual": 1.0e-6, "most": 3, "every": 2}


def column(path, key):
    return [json.loads(line).get(key) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_scheduled_lambda_and_a_cap_that_adapts_are_part_of_the_promise(data, tmp_path):
    own = (f"algorithm.lam={LAM}", f"algorithm.solver.adapt={ADAPT}")
    expected = train_alone(tiny(data, *own), tmp_path / "whole")
    lams = column(tmp_path / "whole", "algorithm_lam")
    assert lams[0] == 0.1 and lams[3] == pytest.approx(1.05) and lams == sorted(lams)
    assert column(tmp_path / "whole", "algorithm_cg_steps") == [2, 2, 3, 3, 3, 3]
    assert column(tmp_path / "whole", "cg_iterations") == [2, 2, 3, 3, 3, 3]
    assert train_alone(tiny(data), tmp_path / "plain")["params"] != expected["params"]
    assert column(tmp_path / "plain", "algorithm_lam") == [None] * 6

    train_alone(tiny(data, *own, steps=3), tmp_path / "parts")
    _, facts = checkpoints.load_newest(tmp_path / "parts" / "checkpoints")
    assert facts["cap"]["cap"] == 3 and facts["cap"]["counted"] == 1 and facts["cap"]["total"] > 0
    assert train_alone(tiny(data, *own), tmp_path / "parts") == expected

    raw = raw_config(data)
    raw["algorithm"]["lam"] = LAM
    raw["algorithm"]["solver"]["adapt"] = ADAPT
    RunDirectory(tmp_path / "two").begin(resolve(build_config(raw), cuda=False))
    run_group(2, train_in_a_group, raw, str(tmp_path / "two"))
    assert fingerprint(tmp_path / "two") == expected


def test_cg_steps_follow_their_schedule(data, tmp_path):
    steps = "algorithm.solver.schedule={kind: step, to: 5, updates: 4, stages: 3}"
    train_alone(tiny(data, steps, "validate.tasks=0", "evaluate.tasks=1"), tmp_path / "run")
    assert column(tmp_path / "run", "algorithm_cg_steps") == [2, 2, 3, 4, 5, 5]
    assert column(tmp_path / "run", "cg_iterations") == [2, 2, 3, 4, 5, 5]


def test_a_checkpoint_is_tested_with_the_lambda_it_was_validated_with(data, tmp_path):
    """Adaptation itself depends on lambda: with its first value the accuracies would be others."""
    from pipelines.evaluate import evaluate_run

    # A very large one holds the parameters where they are.
    newton = ("algorithm.inner={kind: newton_cg, steps: 3}", "run.steps=2")
    scheduled = "algorithm.lam={init: 0.01, schedule: {to: 1.0e6, updates: 1}}"
    found = train_alone(tiny(data, scheduled, *newton), tmp_path / "run")["test"]
    assert evaluate_run(tmp_path / "run", tasks=20)["per_task"] == found
    assert found != train_alone(tiny(data, "algorithm.lam=0.01", *newton), tmp_path / "first")["test"]
