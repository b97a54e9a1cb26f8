"""The figure of what the algorithm itself learns."""

import math

import numpy as np

from imaml_dist.reporting.learned import COLOURS, learned_curves, read_learned


def _record(step, **values):
    return {
        "step": step,
        **{f"algorithm_{n}_{w}": v for n, vs in values.items() for w, v in zip(("min", "median", "max"), vs)},
    }


def test_parameters_are_found_by_their_three_summaries():
    records = [_record(0, lam=(1.0, 2.0, 3.0)), _record(1, lam=(1.5, 2.5, 3.5), lr_median=(0.1, 0.2, 0.3)), {"step": 2}]
    lam, odd = read_learned(records)
    assert (lam.name, odd.name) == ("lam", "lr_median")
    assert lam.steps.tolist() == [0, 1]
    assert (lam.low.tolist(), lam.median.tolist(), lam.high.tolist()) == ([1.0, 1.5], [2.0, 2.5], [3.0, 3.5])
    assert read_learned([{"step": 0, "meta_loss": 1.0}]) == []


def test_numbers_that_are_not_finite_leave_gaps():
    records = [_record(s, lam=(1.0, math.nan if s == 1 else 2.0, None if s == 2 else 3.0)) for s in range(4)]
    (lam,) = read_learned(records)
    assert lam.steps.tolist() == [0, 3]
    assert read_learned([_record(0, lam=(None, None, None))]) == []


def test_the_axis_is_logarithmic_only_where_all_is_positive():
    for low, scale in ((0.01, "log"), (0.0, "linear"), (-0.1, "linear")):
        figure = learned_curves(read_learned([_record(s, lam=(low, 0.1 + s, 2.0 + s)) for s in range(5)]))
        (axes,) = figure.axes
        assert axes.get_yscale() == scale
        assert np.asarray(axes.lines[0].get_ydata()).tolist() == [0.1 + s for s in range(5)]


def test_one_step_one_constant_and_too_many_parameters_are_drawn():
    learned_curves(read_learned([_record(0, lam=(0.1, 0.1, 0.1))]))
    many = read_learned([_record(s, **{f"p{i}": (1.0, 2.0, 3.0) for i in range(12)}) for s in range(3)])
    assert len(many) == 12
    assert len(learned_curves(many).axes[0].lines) == len(COLOURS)
