"""Names at the ends of curves: as near to their ends as they can be without lying over each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from imaml_dist.reporting.end_labels import End, name_ends, spread
from imaml_dist.reporting.sweep_figures import validation_curves
from imaml_dist.reporting.sweep_reading import TrialRow

HEIGHTS = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=12).map(sorted)


@given(HEIGHTS, st.integers(0, 2**31))
def test_nothing_that_keeps_the_distance_is_nearer(heights, seed):
    at, apart = np.array(heights), 8.0
    found = spread(at, apart, 0.0, 100.0)
    assert (np.diff(found) >= apart - 1e-9).all()
    assert found.min() >= -1e-9 and found.max() <= 100.0 + 1e-9
    generator = np.random.default_rng(seed)
    steps, room = apart * np.arange(len(at)), 100.0 - apart * (len(at) - 1)
    for width in (room, 1.0):  # any heights that are allowed, and some near those found
        near = (found - steps) + generator.uniform(-width, width, len(at))
        other = np.clip(np.sort(near), 0.0, room) + steps
        assert ((other - at) ** 2).sum() >= ((found - at) ** 2).sum() - 1e-6


def trial(number: int, last: float, steps: int = 60) -> TrialRow:
    curve = np.array([[20.0, float(steps)], [last - 0.1, last]])
    status = "finished" if steps == 60 else "stopped"
    return TrialRow(number, status, {}, last, 0.01, steps, steps, 16 * steps, 1.0, 0, 0.0, 1.0, "", curve)


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Where each name is drawn, without its line, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = {text.get_text(): Text.get_window_extent(text, canvas.get_renderer()) for text in figure.axes[0].texts}
    for name, box in drawn.items():
        assert box.x1 <= figure.bbox.x1, f"{name} is cut off"
    return {name: (box.x0, box.x1, box.y0, box.y1) for name, box in drawn.items()}


def overlapping(places: dict[str, tuple[float, float, float, float]]) -> list[tuple[str, str]]:
    def meet(a, b):
        return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]

    return [(a, b) for a in places for b in places if a < b and meet(places[a], places[b])]


@pytest.mark.parametrize("first", [0, 990])
def test_trials_that_end_alike_have_numbers_that_can_be_read(first):
    """Some in the same point, some stopped within a number's width of each other."""
    lasts = [0.90, 0.90, 0.9001, 0.89, 0.7, 0.5]
    trials = [trial(first + n, last) for n, last in enumerate(lasts)]
    trials += [trial(first + 6 + n, 0.6 + 0.001 * n, 30 + n % 3) for n in range(4)]
    places = boxes(validation_curves(trials, first))
    assert places.keys() == {str(one.number) for one in trials}
    assert overlapping(places) == []
    upwards = sorted(range(6), key=lambda n: places[str(first + n)][2])
    assert [lasts[n] for n in upwards] == sorted(lasts)


def test_of_more_trials_than_have_room_the_best_one_and_the_highest_are_numbered():
    trials = [trial(n, 0.5 + 0.004 * n) for n in range(100)]
    places = boxes(validation_curves(trials, best=3))
    assert overlapping(places) == []
    assert 15 < len(places) < 40
    assert places.keys() == {"3", *(str(n) for n in range(101 - len(places), 100))}


def test_a_name_that_has_room_stands_at_the_height_of_its_end():
    axes = Figure(figsize=(6, 4)).add_axes((0.1, 0.1, 0.8, 0.8))
    ends = [End("low", 1.0, 0.1, "k"), End("high", 1.0, 0.9, "k")]
    for end in ends:
        axes.plot([0, end.x], [0, end.y])
    name_ends(axes, ends)
    assert [text.xyann[1] for text in axes.texts] == pytest.approx([0.0, 0.0], abs=1e-6)
