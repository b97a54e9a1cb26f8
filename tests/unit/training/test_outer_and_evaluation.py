"""Learning-rate schedules, clipping, and the statistics of an evaluation."""

import math
import statistics

import pytest
import torch

from imaml_dist.config.schema import OuterConfig
from imaml_dist.training.evaluation import Evaluation
from imaml_dist.training.outer import clip_norm, learning_rate


def test_schedules_are_their_formulas():
    assert {learning_rate(OuterConfig(lr=0.5), s, 10) for s in range(10)} == {0.5}
    linear = OuterConfig(lr=1.0, schedule="linear", warmup=2)
    assert [learning_rate(linear, s, 10) for s in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = OuterConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 1.0
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(cosine, 9, 10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_clipping_shortens_only_what_is_too_long():
    gradient = torch.tensor([3.0, 4.0])
    clipped, norm = clip_norm(gradient, 1.0)
    torch.testing.assert_close(clipped, torch.tensor([0.6, 0.8]))
    assert norm == 5.0
    for limit in (None, 5.0, 7.0):
        assert clip_norm(gradient, limit)[0] is gradient


def test_interval_is_that_of_the_mean_over_tasks():
    values = [0.2, 0.4, 0.9, 0.5]
    found = Evaluation.of(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.ci95 == pytest.approx(1.96 * statistics.stdev(values) / 2)
    assert math.isnan(Evaluation.of([0.3]).ci95)
