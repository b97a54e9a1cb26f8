"""The statistics of an evaluation, and its two kinds of accuracy."""

import math
import statistics

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist import FOMAML, EpisodeBatch, GradientDescent, MetaLearner, evaluate, mean_squared_error
from imaml_dist.algorithms import memory
from imaml_dist.errors import InputError, ModelError, NoRoomError
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.sinusoid import Sinusoids
from imaml_dist.training.evaluation import Evaluation, Scored, predict_queries, query_outputs, task_scores


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
    assert task_scores(subject, episodes).tolist() == [[*row, Scored.ACCURACY] for row in expected]

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


@pytest.mark.parametrize(("scored", "metric"), [(Scored.ACCURACY, "accuracy"), (Scored.LOSS, "loss")])
def test_json_form_has_both_kinds(scored, metric):
    found = Evaluation.of_rows([[0.5, 0.25, scored], [0.7, 0.35, scored]]).to_dict()
    assert found.keys() == {"mean", "ci95", "per_task", "metric", "inductive"}
    assert found["metric"] == metric
    assert found["inductive"].keys() == {"mean", "ci95", "per_task"}
    assert (found["per_task"], found["inductive"]["per_task"]) == ([0.5, 0.7], [0.25, 0.35])


class Damaged(Noise):
    """`Noise` with damage in the tasks of some numbers."""

    def __init__(self, damage):
        self.damage = damage

    def episodes(self, step, tasks):
        episodes = super().episodes(step, tasks)
        for task, damage in self.damage.items():
            if task in tasks:
                damage(episodes, tasks.index(task))
        return episodes


def label_too_large(episodes, row):
    episodes.support_y[row, 0] = 3


def label_negative(episodes, row):
    episodes.query_y[row, 1] = -1


def not_a_number(episodes, row):
    episodes.query_x[row, 2, 0] = torch.nan


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_tasks_that_cannot_be_used_are_named_and_never_left_out(execution):
    subject, damage = learner(execution), {0: label_too_large, 3: not_a_number, 12: label_negative}
    rows, whole = (task_scores(subject, s.episodes(0, range(5))) for s in (Damaged(damage), Noise()))
    assert rows[:, 2].tolist() == [0, 1, 1, 0, 1]
    assert rows[[0, 3], :2].isnan().all()
    assert torch.equal(rows[[1, 2, 4]], whole[[1, 2, 4]]), "the others keep their scores"
    with pytest.raises(InputError, match=r"3 of 15 tasks cannot be evaluated, .*: task 0, 3, 12; mend") as caught:
        evaluate(subject, Damaged(damage), tasks=15)
    assert "\n" not in str(caught.value)
    assert evaluate(subject, Damaged({12: label_negative}), tasks=11).mean >= 0, "only of the tasks asked for"


def conv4_learner():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    y = torch.arange(3).repeat(8, 3)
    subject = MetaLearner(Conv4((1, 28, 28), 3, 8), FOMAML(GradientDescent(0.1, 2)), execution="native")
    return subject, EpisodeBatch(x[0], y, x[1], y, index=torch.arange(8))


def narrowed(subject, monkeypatch, most):
    """The learner on a device with room for so many tasks, and how many it was given each time."""
    predict, sizes = subject.functional.predict_inductive, []

    def predict_inductive(params, *samples):
        sizes.append(len(params))
        if len(params) > most:
            raise torch.OutOfMemoryError
        return predict(params, *samples)

    monkeypatch.setattr(subject.functional, "predict_inductive", predict_inductive)
    return sizes


@NATIVE
def test_tasks_that_do_not_fit_together_are_evaluated_in_parts_with_the_same_bits(monkeypatch):
    subject, episodes = conv4_learner()
    whole = query_outputs(subject, episodes)
    sizes = narrowed(subject, monkeypatch, 4)
    parts = query_outputs(subject, episodes)
    assert sizes == [8, 4, 4]
    assert torch.equal(parts.transductive, whole.transductive) and torch.equal(parts.inductive, whole.inductive)
    query_outputs(subject, episodes)
    assert sizes == [8, 4, 4, 4, 4], "what failed is not tried again"


@NATIVE
def test_tasks_that_are_trained_one_by_one_are_evaluated_so(monkeypatch):
    episodes = Noise().episodes(0, range(2))
    x, y = episodes.support_x.repeat(1, 8, 1), episodes.support_y.repeat(1, 8)
    subject = learner("native")
    sizes = narrowed(subject, monkeypatch, 1)
    query_outputs(subject, EpisodeBatch(x, y, episodes.query_x, episodes.query_y, index=episodes.index))
    assert sizes == [1, 1]


def test_on_a_cpu_an_evaluation_is_cut_by_what_is_free(monkeypatch):
    subject, episodes = learner(), Noise().episodes(0, range(8))
    whole = query_outputs(subject, episodes)
    subject.memory_of(episodes, "evaluation").measured = {4: 400}
    monkeypatch.setattr(memory, "free_bytes", lambda device: 900)
    sizes = narrowed(subject, monkeypatch, 8)
    torch.testing.assert_close(query_outputs(subject, episodes).inductive, whole.inductive)
    assert sizes == [4, 4]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    with pytest.raises(NoRoomError, match=r"a call with 2 tasks takes .* and 1e-09 GB are free"):
        query_outputs(subject, episodes)


@pytest.mark.parametrize(("execution", "least"), [("vmap", 3), ("loop", 1)])
def test_where_not_even_the_fewest_tasks_can_be_evaluated_it_says_so(execution, least, monkeypatch):
    subject = learner(execution)
    narrowed(subject, monkeypatch, 0)
    with pytest.raises(NoRoomError, match=f"evaluating tasks {least} at a time takes more memory than cpu has; end"):
        evaluate(subject, Noise(), tasks=8)


class OneQuery:
    """A `TaskSource` of 3-way tasks, two shots, with a single query sample."""

    def __init__(self, *shape):
        self.shape = shape

    def episodes(self, step, tasks):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(20, 7, *self.shape, generator=generator, dtype=torch.float64)[list(tasks)]
        y = torch.tensor([0, 1, 2, 0, 1, 2, 1]).repeat(len(tasks), 1)
        return EpisodeBatch(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:], index=torch.tensor(list(tasks)))


def one_query_learner(name, execution):
    torch.manual_seed(0)
    networks = {
        "batch norm 1d": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        "conv4": lambda: Conv4((1, 28, 28), 3, 4),
        "mlp": lambda: MLP((1, 2, 2), 3, [5]),
    }
    source = OneQuery(*{"batch norm 1d": (4,), "conv4": (1, 28, 28), "mlp": (1, 2, 2)}[name])
    return MetaLearner(networks[name]().double(), FOMAML(GradientDescent(0.1, 2)), execution=execution), source


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["batch norm 1d", "conv4", "mlp"])
def test_a_single_query_sample_is_judged_inductively_also_by_the_very_first_call(name, execution):
    subject, source = one_query_learner(name, execution)
    whole = evaluate(subject, source, tasks=12)
    episodes, right = source.episodes(0, range(12)), []
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    for t in range(12):
        params, support, query = phi[t : t + 1], episodes.support_x[t : t + 1], episodes.query_x[t : t + 1]
        outputs = subject.functional.predict_inductive(params, support, query)
        together = subject.functional.predict_inductive(params, support, torch.cat([query, 2 * support], dim=1))
        torch.testing.assert_close(outputs, together[:, :1])
        right.append(float(outputs[0, 0].argmax() == 1))
        if name == "batch norm 1d":  # by hand: the statistics of the support set
            named = subject.functional.layout.unflatten(phi[t])
            hidden, alone = (x[0] @ named["0.weight"].T + named["0.bias"] for x in (support, query))
            normal = (alone - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
            normal = torch.tanh(normal * named["1.weight"] + named["1.bias"])
            torch.testing.assert_close(outputs[0], normal @ named["3.weight"].T + named["3.bias"])
    assert whole.inductive.per_task == right
    if name == "batch norm 1d":  # one value per channel has no statistics
        assert math.isnan(whole.mean) and all(map(math.isnan, whole.per_task))
        assert predict_queries(subject, episodes).transductive is None
    else:
        assert all(score in (0.0, 1.0) for score in whole.per_task)
    if name == "mlp":
        assert whole.per_task == whole.inductive.per_task


def test_meta_training_on_a_single_query_sample_without_statistics_is_refused():
    subject, source = one_query_learner("batch norm 1d", "vmap")
    says = r"batch normalisation of an input of shape \(1, 5\): one value per channel has no statistics; give two"
    with pytest.raises(ModelError, match=says) as caught:
        subject.meta_gradient(source.episodes(0, range(2)))
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_regression_is_judged_by_the_query_loss(execution):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    subject = MetaLearner(model, FOMAML(GradientDescent(0.05, 3)), mean_squared_error, execution)
    source = Sinusoids(5, 7, dtype=torch.float64)
    found = evaluate(subject, source, tasks=12)
    assert found.metric == found.inductive.metric == found.to_dict()["metric"] == "loss"
    episodes = source.episodes(0, range(12))
    for t, (together, alone) in enumerate(zip(found.per_task, found.inductive.per_task, strict=True)):
        adapted = subject.adapt(episodes.support_x[t], episodes.support_y[t])  # uses statistics of what it is given
        expected = (adapted(episodes.query_x[t]) - episodes.query_y[t]).square().mean()
        assert together == pytest.approx(float(expected))
        hidden = adapted[0](episodes.support_x[t])
        normal = (adapted[0](episodes.query_x[t]) - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        outputs = adapted[3](torch.tanh(normal * adapted[1].weight + adapted[1].bias))
        assert alone == pytest.approx(float((outputs - episodes.query_y[t]).square().mean()))
    assert found.mean == pytest.approx(statistics.mean(found.per_task)) != found.inductive.mean


def test_a_loss_that_is_not_finite_is_infinite_and_no_task_without_a_score():
    subject = MetaLearner(MLP((1, 1, 1), 1, [4]).double(), FOMAML(GradientDescent(1e200, 2)), mean_squared_error)
    found = evaluate(subject, Sinusoids(3, 3, dtype=torch.float64), tasks=3)
    assert math.inf in found.per_task and found.inductive.per_task == found.per_task
