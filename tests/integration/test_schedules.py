"""Schedules within a run: the values of every step, and the same bits through a resume in the middle and on more workers."""

import json

from helpers.gloo import run_group
from helpers.runs import fingerprint, raw_config, tiny, train_alone, train_in_a_group

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import resolve
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory

LAM = "algorithm.lam={init: 0.1, schedule: {kind: cosine, to: 2.0, updates: 6}}"
STEPS = "algorithm.solver.schedule={kind: step, to: 5, updates: 4, stages: 3}"
ADAPT = "algorithm.solver.adapt={residual: 1.0e-6, most: 3, every: 2}"


def column(path, key):
    return [json.loads(line).get(key) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_lambda_and_cg_steps_follow_their_schedules_with_the_same_bits(data, tmp_path):
    expected = train_alone(tiny(data, LAM, STEPS), tmp_path / "whole")
    assert column(tmp_path / "whole", "algorithm_cg_steps") == [2, 2, 3, 4, 5, 5]
    assert column(tmp_path / "whole", "cg_iterations") == [2, 2, 3, 4, 5, 5]
    lams = column(tmp_path / "whole", "algorithm_lam")
    assert lams[0] == 0.1 and lams[3] == (0.1 + 2.0) / 2 and lams == sorted(lams)
    assert train_alone(tiny(data), tmp_path / "plain")["params"] != expected["params"]
    assert column(tmp_path / "plain", "algorithm_lam") == [None] * 6

    train_alone(tiny(data, LAM, STEPS, steps=3), tmp_path / "parts")
    assert train_alone(tiny(data, LAM, STEPS), tmp_path / "parts") == expected

    raw = raw_config(data)
    raw["algorithm"]["lam"] = {"init": 0.1, "schedule": {"kind": "cosine", "to": 2.0, "updates": 6}}
    raw["algorithm"]["solver"]["schedule"] = {"kind": "step", "to": 5, "updates": 4, "stages": 3}
    RunDirectory(tmp_path / "three").begin(resolve(build_config(raw), cuda=False))
    run_group(3, train_in_a_group, raw, str(tmp_path / "three"))
    assert fingerprint(tmp_path / "three") == expected


def test_a_cap_that_adapts_is_part_of_the_state(data, tmp_path):
    expected = train_alone(tiny(data, ADAPT), tmp_path / "whole")
    assert column(tmp_path / "whole", "algorithm_cg_steps") == [2, 2, 3, 3, 3, 3]
    _, facts = checkpoints.load_newest(tmp_path / "whole" / "checkpoints")
    assert facts["cap"]["cap"] == 3

    train_alone(tiny(data, ADAPT, steps=3), tmp_path / "parts")
    _, facts = checkpoints.load_newest(tmp_path / "parts" / "checkpoints")
    assert facts["cap"]["counted"] == 1 and facts["cap"]["total"] > 0
    assert train_alone(tiny(data, ADAPT), tmp_path / "parts") == expected

    raw = raw_config(data)
    raw["algorithm"]["solver"]["adapt"] = {"residual": 1.0e-6, "most": 3, "every": 2}
    RunDirectory(tmp_path / "two").begin(resolve(build_config(raw), cuda=False))
    run_group(2, train_in_a_group, raw, str(tmp_path / "two"))
    assert fingerprint(tmp_path / "two") == expected


def test_a_checkpoint_is_tested_with_the_lambda_it_was_validated_with(data, tmp_path):
    """Adaptation itself depends on lambda: evaluating with its first value would give another accuracy."""
    from pipelines.evaluate import evaluate_run

    # Without a step of adaptation that matters lambda would not show; a large one holds the parameters where they are.
    lam = "algorithm.lam={init: 0.01, schedule: {to: 1.0e6, updates: 1}}"
    config = tiny(data, lam, "algorithm.inner={kind: newton_cg, steps: 3}", "evaluate.tasks=20")
    run = train_alone(config, tmp_path / "run")
    assert evaluate_run(tmp_path / "run", tasks=20)["per_task"] == run["test"]
    first = train_alone(
        tiny(data, "algorithm.lam=0.01", "algorithm.inner={kind: newton_cg, steps: 3}"), tmp_path / "first"
    )
    assert run["test"] != first["test"]
