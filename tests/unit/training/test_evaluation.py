"""The statistics of an evaluation, and its two kinds of accuracy."""

import math
import statistics

import pytest
import torch
from torch import nn

from imaml_dist import FOMAML, EpisodeBatch, GradientDescent, MetaLearner, evaluate
from imaml_dist.errors import ModelError
from imaml_dist.training.evaluation import Evaluation, predict_queries, task_accuracies


class Noise:
    """A `TaskSource` of 3-way episodes on which nobody is perfect."""

    def episodes(self, step, tasks):
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(2, 100, 9, 4, generator=generator, dtype=torch.float64)[:, list(tasks)]
        y = torch.arange(3).repeat(len(tasks), 3)
        return EpisodeBatch(x[0], y, x[1], y, index=torch.tensor(list(tasks)))


def learner(execution="vmap"):
    torch.manual_seed(0)
    return MetaLearner(nn.Linear(4, 3).double(), FOMAML(GradientDescent(0.5, 3)), execution=execution)


def turned(subject, monkeypatch):
    """A stand-in for a network whose batch statistics matter: alone, a query image gets the class after the one it gets together."""

    def predict_inductive(params, support_x, query_x):
        return subject.functional.predict(params, query_x).roll(1, -1)

    monkeypatch.setattr(subject.functional, "predict_inductive", predict_inductive)
    return subject


def test_interval_is_that_of_the_mean_over_tasks():
    values = [0.2, 0.4, 0.9, 0.5]
    found = Evaluation.of(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.ci95 == pytest.approx(1.96 * statistics.stdev(values) / 2)
    assert math.isnan(Evaluation.of([0.3]).ci95)
    assert found.inductive is None


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_both_kinds_are_counted_task_by_task(execution, monkeypatch):
    subject, episodes = turned(learner(execution), monkeypatch), Noise().episodes(0, range(5))
    found = predict_queries(subject, episodes)
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    guesses = [subject.functional.predict(phi[t : t + 1], episodes.query_x[t : t + 1])[0].argmax(-1) for t in range(5)]
    assert torch.equal(found.transductive, torch.stack(guesses))
    assert torch.equal(found.inductive, (torch.stack(guesses) + 1) % 3)
    expected = [[float((g == episodes.query_y[0]).double().mean()) for g in (g, (g + 1) % 3)] for g in guesses]
    assert task_accuracies(subject, episodes).tolist() == expected

    whole = evaluate(subject, Noise(), tasks=25)
    assert [list(row) for row in zip(whole.per_task, whole.inductive.per_task, strict=True)][:5] == expected
    assert whole.mean == pytest.approx(statistics.mean(whole.per_task))
    assert whole.inductive.mean == pytest.approx(statistics.mean(whole.inductive.per_task))
    assert whole.mean != whole.inductive.mean


def test_a_network_that_cannot_be_used_inductively_has_one_accuracy(monkeypatch):
    subject = learner()

    def refuse(*_):
        raise ModelError("no statistics")

    monkeypatch.setattr(subject.functional, "predict_inductive", refuse)
    found = evaluate(subject, Noise(), tasks=4)
    assert found.inductive is None
    assert found.per_task == evaluate(learner(), Noise(), tasks=4).per_task
    assert found.to_dict()["inductive"] is None


def test_outputs_that_are_not_finite_are_never_right():
    subject, episodes = learner(), Noise().episodes(0, range(2))
    episodes.query_x[0, 0] = torch.nan
    found = predict_queries(subject, episodes)
    assert (found.transductive[0, 0], found.inductive[0, 0]) == (-1, -1)
    assert (found.transductive[1] >= 0).all()


def test_json_form_has_both_kinds():
    found = Evaluation.of_rows([[0.5, 0.25], [0.7, 0.35]]).to_dict()
    assert found.keys() == {"mean", "ci95", "per_task", "inductive"}
    assert found["inductive"].keys() == {"mean", "ci95", "per_task"}
    assert (found["per_task"], found["inductive"]["per_task"]) == ([0.5, 0.7], [0.25, 0.35])
