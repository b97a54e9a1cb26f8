"""The figures of lambda and CG steps that change while a run goes on."""

import numpy as np

from imaml_dist.reporting.drawing import MAX_POINTS
from imaml_dist.reporting.scheduled import read_scheduled, scheduled_curve


def curve(key, values, first=0):
    records = [{"step": first + step, key: value} for step, value in enumerate(values)]
    (one,) = read_scheduled(records)
    (axes,) = scheduled_curve(one).axes
    return one, axes, axes.lines[0]


def at(line, steps):
    """What a reader sees at these steps: the last value drawn at or before each."""
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    return y[np.searchsorted(x, steps, side="right") - 1].tolist()


def test_only_what_may_change_is_found():
    assert (
        list(read_scheduled([]))
        == list(read_scheduled([{"step": 0, "cg_iterations": 5, "algorithm_lam_median": 0.1}]))
        == []
    )
    both = list(read_scheduled([{"step": 0, "algorithm_cg_steps": 2, "algorithm_lam": 0.1}]))
    assert [one.title for one in both] == ["Lambda", "CG steps at most"]


def test_steps_are_drawn_as_steps():
    values = [2, 2, 2, 3, 3, 5, 5, 4]
    one, axes, line = curve("algorithm_cg_steps", values, first=10)
    assert line.get_drawstyle() == "steps-post"
    assert at(line, range(10, 18)) == values
    assert one.ends == "2 at first, 4 at the end"
    assert all(float(tick).is_integer() for tick in axes.get_yticks())
    assert axes.get_yscale() == "linear"


def test_a_long_schedule_is_thinned_and_keeps_its_ends():
    values = np.geomspace(0.1, 10.0, 50_000).tolist()
    _, axes, line = curve("algorithm_lam", values)
    drawn = np.asarray(line.get_ydata())
    assert len(drawn) <= MAX_POINTS + 1
    assert (drawn[0], drawn[-1]) == (values[0], values[-1])
    assert axes.get_yscale() == "log"
    assert np.allclose(at(line, range(0, 50_000, 7)), values[::7], rtol=0.01)


def test_one_step_is_a_point():
    _, _, line = curve("algorithm_lam", [0.3])
    assert (line.get_marker(), line.get_ydata().tolist()) == (".", [0.3])
