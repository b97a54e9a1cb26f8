"""Sweeps: what is accepted, and that every space that cannot be trained is refused in one sentence before anything starts."""

import pytest
import yaml
from helpers.runs import raw_config

from imaml_dist.config.load_sweep import load_sweep, sweep_yaml
from imaml_dist.errors import ConfigError
from imaml_dist.sweeps.drawing import draw
from imaml_dist.sweeps.feasible import baseline_of, check_feasible, trials_of

LAM = {"kind": "loguniform", "low": 0.01, "high": 10.0}
STEPS = {"kind": "choice", "values": [1, 2, 5]}


def write(folder, **fields):
    (folder / "base.yaml").write_text(yaml.safe_dump(raw_config(folder)))
    raw = {
        "name": "s",
        "base": "base.yaml",
        "space": {"algorithm.lam": LAM, "algorithm.solver.max_iterations": STEPS},
        "budget": {"trials": 4},
        **fields,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def loaded(folder, *overrides, **fields):
    sweep = load_sweep(write(folder, **fields), overrides)
    check_feasible(sweep)
    return sweep


def test_a_base_is_a_file_beside_the_sweep_or_a_mapping(tmp_path):
    by_file = loaded(tmp_path)
    inline = loaded(tmp_path, base=raw_config(tmp_path))
    assert by_file.base() == inline.base()
    assert by_file.base().run.steps == 6


def test_the_budget_the_fixed_fields_and_overrides_reach_the_trials(tmp_path):
    sweep = loaded(
        tmp_path,
        "base.outer.lr=0.5",
        "budget.trials=3",
        "space.algorithm.lam.high=2.0",
        "set.run.chunk=4",
        set={"run.workers": 1},
        budget={"trials": 4, "steps": 40, "seconds": 7.5},
    )
    trial = sweep.experiment({"algorithm.lam": 0.7}, {"name": "t"})
    assert (trial.name, trial.run.steps, trial.run.max_seconds) == ("t", 40, 7.5)
    assert (trial.run.workers, trial.run.chunk, trial.outer.lr, trial.algorithm.lam) == (1, 4, 0.5, 0.7)
    assert (sweep.config.budget.trials, sweep.config.space["algorithm.lam"].high) == (3, 2.0)


def test_a_value_may_be_a_whole_section(tmp_path):
    solvers = [{"kind": "conjugate_gradient", "max_iterations": 3}, {"kind": "dual"}]
    sweep = loaded(tmp_path, space={"algorithm.solver": {"kind": "grid", "values": solvers}}, budget={})
    assert [one.algorithm.solver.kind for one in check_feasible(sweep)[-2:]] == ["conjugate_gradient", "dual"]
    assert trials_of(sweep.config, "here") == 2


def test_what_is_written_down_reads_back_as_the_same_sweep(tmp_path):
    sweep = loaded(tmp_path, "base.outer.lr=0.5", set={"run.workers": 1})
    (tmp_path / "again.yaml").write_text(sweep_yaml(sweep))
    again = load_sweep(tmp_path / "again.yaml")
    assert again.base() == sweep.base()
    assert again.resolved() == sweep.resolved()


def test_text_of_any_characters_reaches_trial_and_file_as_it_is(tmp_path):
    text = "runs/1e5 💡 \x7f\u2028"
    sweep = loaded(tmp_path, "base.tracking.experiment='1e5'", set={"warm_start.path": text})
    trial = sweep.experiment({"algorithm.lam": 0.7}, {})
    assert (trial.warm_start.path, trial.tracking.experiment) == (text, "1e5")
    (tmp_path / "again.yaml").write_text(sweep_yaml(sweep), encoding="utf-8")
    assert load_sweep(tmp_path / "again.yaml").base() == sweep.base()


def test_a_section_of_the_space_is_not_changed_by_the_trials(tmp_path):
    values = [{"kind": "imaml", "lam": 0.1, "inner": {"kind": "lbfgs", "memory": 3}}, {"kind": "fomaml"}]
    sweep = loaded(tmp_path, space={"algorithm": {"kind": "grid", "values": values}}, budget={})
    before = str(sweep.config)
    sweep.experiment({"algorithm": values[0], "algorithm.inner.kind": "adam"}, {})
    assert str(sweep.config) == before and values[0]["inner"] == {"kind": "lbfgs", "memory": 3}


def test_a_baseline_is_found_among_sections_that_are_written_short(tmp_path):
    short = {"kind": "conjugate_gradient", "max_iterations": 2}
    space = {
        "algorithm.solver": {"kind": "choice", "values": [{"kind": "dual"}, short]},
        "algorithm.lam.init": {"kind": "loguniform", "low": 0.01, "high": 1.0},
    }
    assert baseline_of(loaded(tmp_path, "baseline=true", space=space)) == {
        "algorithm.solver": short,
        "algorithm.lam.init": 0.1,
    }


def test_a_baseline_has_the_bases_own_values_and_comes_before_the_drawn_ones(tmp_path):
    with_it, without = loaded(tmp_path, "baseline=true"), loaded(tmp_path)
    assert baseline_of(with_it) == {"algorithm.lam": 0.1, "algorithm.solver.max_iterations": 2}
    assert [draw(with_it.config, n + 1) for n in range(3)] == [draw(without.config, n) for n in range(3)]
    grid = {"algorithm.lam": {"kind": "grid", "values": [0.1, 2.0]}}
    swept = loaded(tmp_path, "baseline=true", space=grid, searcher={"kind": "grid"}, budget={})
    assert trials_of(swept.config, "here") == 3


@pytest.mark.parametrize(
    ("fields", "overrides", "says"),
    [
        ({"spase": {}}, [], r"spase: is not a known field; did you mean space\?"),
        ({}, ["budget.trial=3"], r"budget\.trial: is not a known field; did you mean budget\.trials\?"),
        ({}, ["base.algorithm.kind=maml"], r"algorithm\.(lam|solver): is not a known field"),
        ({}, ["base.run.stepps=3"], r"run\.stepps: is not a known field; did you mean run\.steps\?"),
        (
            {"space": {"algorithm.lamda": LAM}},
            [],
            r"algorithm\.lamda: is not a known field; did you mean algorithm\.lam\?",
        ),
        (
            {"space": {"algorithm.lam": {**LAM, "hi": 1.0}}},
            [],
            r"space of algorithm\.lam\.hi: is not a known field; did you mean",
        ),
        (
            {"space": {"algorithm.lam": {"kind": "log"}}},
            [],
            r"space of algorithm\.lam\.kind: 'log' given, should be 'uniform',",
        ),
        ({"space": {"algorithm.lam": {**LAM, "low": 20.0}}}, [], r"low 20 given with high 10; low is less than high"),
        (
            {"space": {"algorithm.lam": {**LAM, "low": 0.0}}},
            [],
            r"space of algorithm\.lam\.low: 0\.0 given, should be greater",
        ),
        (
            {"space": {"algorithm.lam": {"kind": "choice", "values": []}}},
            [],
            r"space of algorithm\.lam\.values: \[\] given",
        ),
        (
            {"space": {"algorithm.lam": {"kind": "grid", "values": [1.0, 1.0]}}},
            [],
            r"values has 1\.0 twice; give each once",
        ),
        (
            {"space": {"algorithm.lam": {"kind": "uniform", "low": -1.0, "high": 1.0}}},
            [],
            r"lam=-1\.0: algorithm\.lam: -1\.0 given",
        ),
        ({"space": {"run.chunk": {"kind": "choice", "values": [2, 3]}}}, [], r"must be a multiple of run\.chunk = 3"),
        (
            {"space": {"run.chunk": {"kind": "grid", "values": [1, 3]}}},
            [],
            r"at run\.chunk=3: run\.tasks_per_step: 8 given",
        ),
        ({"space": {"algorithm.lam": LAM, "algorithm": STEPS}}, [], r"algorithm\.lam and algorithm overlap"),
        ({"set": {"algorithm.lam": 1.0}}, [], r"algorithm\.lam stands in both space and set"),
        (
            {"space": {"run.steps": STEPS}, "budget": {"trials": 3, "steps": 5}},
            [],
            r"run\.steps is decided by budget\.steps",
        ),
        (
            {"space": {"validate.tasks": STEPS}},
            [],
            r"space\.validate\.tasks: validate\.tasks is decided by validation\.tasks",
        ),
        (
            {"space": {"data.way": STEPS}},
            [],
            r"data\.way is decided by the base, for all trials are measured on the same",
        ),
        (
            {"searcher": {"kind": "grid"}},
            [],
            r"space\.algorithm\.lam: loguniform given, whose values searcher grid cannot",
        ),
        ({"searcher": {"kind": "tpe"}}, [], r"searcher\.kind: 'tpe' given, should be 'random', 'grid' or 'optuna'"),
        ({"budget": {}}, [], r"budget\.trials: is missing; say how many trials searcher random"),
        (
            {"space": {"algorithm.lam": {"kind": "grid", "values": [1.0, 2.0]}}, "searcher": {"kind": "grid"}},
            [],
            r"budget\.trials: 4 given, but the grid has 2 points",
        ),
        (
            {"space": {"algorithm.lam": {"kind": "grid", "values": [1.0, 2.0]}}, "searcher": {"kind": "optuna"}},
            [],
            r"grid given, which searcher optuna does not go through",
        ),
        (
            {"scheduler": {"kind": "asha", "grace": 2}},
            [],
            r"trials validate every 3 of 6 meta-steps, so that it must be at least 3",
        ),
        ({"scheduler": {"kind": "median", "grace": 6}}, [], r"scheduler\.grace: 6 given, .* less than 6"),
        ({"baseline": True}, ["base.algorithm.lam=0.001"], r"algorithm\.lam stands in both space and set"),
        (
            {"baseline": True, "space": {"outer.lr": {**LAM, "low": 1.0}}},
            [],
            r"the base's outer\.lr is 0\.003, which does not",
        ),
        ({"base": "other.yaml"}, [], r"there is no configuration file .*other\.yaml"),
        ({}, ["max_concurrent=none"], r"max_concurrent: 'none' given, should be 'auto'"),
        ({}, ["space.algorithm.lam"], r"expected section\.field=value"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_sentence(tmp_path, fields, overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        loaded(tmp_path, *overrides, **fields)
    assert len(str(caught.value).splitlines()) == 1
