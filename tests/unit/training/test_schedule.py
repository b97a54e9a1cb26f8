"""Schedules against their formulas, and the cap that follows residuals."""

import math

import pytest

from imaml_dist.config.load import build_config
from imaml_dist.config.schedule import AdaptConfig, ScheduleConfig
from imaml_dist.distributed.build_algorithm import cg_steps, make_algorithm
from imaml_dist.errors import ConfigError
from imaml_dist.training.schedule import ResidualCap, scheduled


@pytest.mark.parametrize(
    ("kind", "extra", "values"),
    [
        ("linear", {}, {0: 1.0, 25: 2.0, 50: 3.0, 100: 5.0, 7000: 5.0}),
        ("cosine", {}, {0: 1.0, 25: 5 - 2 * (1 + math.cos(math.pi / 4)), 50: 3.0, 100: 5.0, 7000: 5.0}),
        ("step", {"stages": 4}, {0: 1.0, 24: 1.0, 25: 2.0, 49: 2.0, 50: 3.0, 99: 4.0, 100: 5.0}),
        ("step", {}, {0: 1.0, 99: 1.0, 100: 5.0}),
    ],
)
def test_schedules_are_their_formulas(kind, extra, values):
    schedule = ScheduleConfig(kind=kind, to=5.0, updates=100, **extra)
    assert {u: scheduled(1.0, schedule, u) for u in values} == pytest.approx(values)


def test_constant_and_none_stay():
    assert scheduled(0.3, ScheduleConfig(kind="constant"), 10**6) == scheduled(0.3, None, 5) == 0.3


def test_the_cap_moves_by_the_mean_over_a_window_and_keeps_to_its_bounds():
    adapt = AdaptConfig(residual=0.1, fewest=2, most=4, every=2)
    cap = ResidualCap(3)
    caps = []
    for residual in (0.5, math.nan, 0.3, 0.15, 0.2, 0.06, 0.08, 0.01, 0.02, 0.0, 0.0, 0.0, 0.0):
        cap = cap.after(residual, adapt)
        caps.append(cap.cap)
    assert caps == [3, 3, 4, 4, 4, 4, 4, 4, 3, 3, 2, 2, 2]
    assert ResidualCap.from_dict({"cap": 2, "total": 0.5, "counted": 1}) == ResidualCap(2, 0.5, 1)


def test_the_algorithm_is_the_one_of_its_update():
    raw = {
        "name": "x",
        "algorithm": {
            "lam": {"init": 0.1, "schedule": {"kind": "linear", "to": 1.1, "updates": 10}},
            "solver": {"max_iterations": 2, "schedule": {"kind": "linear", "to": 7, "updates": 10}},
        },
    }
    algorithm = build_config(raw).algorithm
    made = [make_algorithm(algorithm, updates) for updates in (0, 5, 10)]
    assert [a.strength.init for a in made] == pytest.approx([0.1, 0.6, 1.1])
    assert [a.solver.max_iterations for a in made] == [2, 5, 7]
    assert cg_steps(algorithm.solver, 0, ResidualCap(9)) == 9


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.lam.schedule.to=1.0", "algorithm.lam.learn=true"], "algorithm.lam.schedule: given together with algorithm.lam.learn"),
        (["algorithm.lam.schedule.to=1.0", "algorithm.lam.kind=diagonal"], "lam.schedule: given with algorithm.lam.kind 'diagonal'"),
        (["algorithm.lam.schedule.kind=cosine"], "algorithm.lam.schedule.to: is missing"),
        (["algorithm.lam.schedule.kind=constant", "algorithm.lam.schedule.to=2.0"], "algorithm.lam.schedule.to: 2.0 given"),
        (["algorithm.lam.schedule={to: 2.0, stages: 3}"], "algorithm.lam.schedule.stages: 3 given"),
        (["algorithm.lam.schedule={to: -2.0}"], "algorithm.lam.schedule.to: -2.0 given"),
        (["algorithm.solver.schedule={to: 2.5}"], "algorithm.solver.schedule.to: 2.5 given"),
        (["algorithm.solver.schedule={to: 9}", "algorithm.solver.adapt={most: 9}"], "algorithm.solver.adapt: given together"),
        (["algorithm.solver.adapt={most: 4}"], "algorithm.solver.max_iterations: 5 given"),
        (["algorithm.solver.adapt={fewest: 9, most: 4}"], "algorithm.solver.adapt.fewest: 9 given"),
        (["algorithm.solver.kind=dual", "algorithm.solver.schedule.to=3"], "algorithm.solver.schedule: is not a known field"),
        (["algorithm.preset=reference", "algorithm.lam.schedule.to=1.0"], "algorithm.lam: reference_inner and lam_offset"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(overrides, said):
    with pytest.raises(ConfigError) as caught:
        build_config({"name": "x"}, overrides)
    assert said in str(caught.value)
