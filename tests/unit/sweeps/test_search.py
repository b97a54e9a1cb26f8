"""The searcher of a sweep: unfinished trials first, then new ones; a trial's result is what it had reported by its end."""

import json

import pytest
import yaml
from helpers.runs import raw_config

from imaml_dist.config.load import load_config
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.sweeps.directory import SweepDirectory
from imaml_dist.sweeps.ledger import Ledger, Result, Trial
from imaml_dist.sweeps.outcome import best_of, outcome
from imaml_dist.sweeps.search import Search


@pytest.fixture
def sweep(tmp_path):
    raw = {
        "name": "s",
        "base": raw_config(tmp_path),
        "space": {"algorithm.lam": {"kind": "loguniform", "low": 0.01, "high": 10.0}},
        "baseline": True,
        "budget": {"trials": 4, "steps": 30},
        "validation": {"tasks": 7},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(raw))
    return load_sweep(tmp_path / "sweep.yaml")


@pytest.fixture
def search(sweep, tmp_path):
    """A searcher of the same sweep directory at every call, as after a restart."""
    directory = SweepDirectory(tmp_path / "sweep")

    def started(trials=4):
        directory.begin(sweep)
        return Search(sweep, Ledger(directory.ledger_file), directory, lambda config: config, trials)

    return started


def record(search, number, curve, steps):
    """Metrics of a trial: `curve` by meta-step."""
    run = search.directory.run(search.ledger.trial(number))
    run.path.mkdir(parents=True)
    lines = [
        {"step": step - 1, "seconds_step": 0.5}
        | ({"val_accuracy": curve[step], "val_ci95": 0.01} if step in curve else {})
        for step in range(1, steps + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_unfinished_trials_come_first_with_their_values_then_new_ones(search):
    first = search()
    begun = [first.next() for _ in range(3)]
    assert [trial.number for trial in begun] == [0, 1, 2] and first.left == 1
    assert begun[0].values == {"algorithm.lam": 0.1}  # the baseline
    record(first, 1, {10: 0.5, 20: 0.75, 30: 0.75}, 30)
    first.finished(1)
    again = search()
    assert again.left == 3
    assert [again.next() for _ in range(4)] == [begun[0], begun[2], again.ledger.trial(3), None]
    assert search(6).left == 5  # a larger budget


def test_a_trial_is_trained_with_its_values_on_the_frozen_tasks_and_is_not_tested(search):
    found = search()
    found.next()
    trial = found.next()
    config = load_config(found.directory.config_file(trial))
    assert (config.name, config.run.steps, config.algorithm.lam) == ("s-0001", 30, trial.values["algorithm.lam"])
    assert (config.validation.tasks, config.evaluate.tasks) == (7, 0)
    assert config.validation.manifest == str(found.directory.validation_file.resolve())


def test_a_result_is_the_best_validation_up_to_the_end_and_the_first_of_equal_ones(search):
    found = search()
    for _ in range(3):
        found.next()
    for number in range(3):
        record(found, number, {10: 0.5, 20: 0.7, 30: 0.7}, 30)
    found.finished(0)
    found.stopped(1, 10)
    found.failed(2, "it crashed")
    assert found.ledger.trial(0).result == Result(0.7, 0.01, 20, 30, 240, 15.0)
    assert found.ledger.trial(1).result == Result(0.5, 0.01, 10, 10, 80, 5.0)
    assert (found.ledger.trial(2).status, found.ledger.trial(2).why) == ("failed", "it crashed")


def test_the_best_is_the_most_accurate_and_of_equal_ones_the_first(sweep):
    trials = [Trial(n, {}, "finished", Result(accuracy=a)) for n, a in enumerate([0.5, None, 0.8, 0.8])]
    assert best_of(trials) == trials[2]
    assert best_of(trials[1:2]) is None
    found = outcome(sweep, trials, {"fingerprint": "f"}, None)
    assert (found["best"], found["median_accuracy"], found["baseline"], found["test"]) == (2, 0.8, True, None)
