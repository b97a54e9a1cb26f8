"""Bad tasks become codes, are excluded before the reduction, and leave every other bit as it was."""

import dataclasses

import pytest
import torch
from helpers.blobs import WAY, Blobs

from imaml_dist import (
    ANIL,
    FOMAML,
    IMAML,
    MAML,
    GradientDescent,
    MetaLearner,
    MetaSGD,
    ProximalStrength,
    Reptile,
    cross_entropy,
)
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.models.mlp import MLP

INNER = GradientDescent(0.3, 3)
ALGORITHMS = [
    IMAML(0.5, INNER),
    IMAML(ProximalStrength("diagonal", 0.5, learn=True), INNER),
    MAML(INNER),
    FOMAML(INNER),
    Reptile(INNER),
    ANIL(INNER),
    MetaSGD(INNER),
]


def nan_support(e):
    e.support_x[1, 0] = torch.nan


def infinite_query(e):
    e.query_x[1, 2] = torch.inf


def label_too_large(e):
    e.support_y[1, 0] = WAY


def label_negative(e):
    e.query_y[1, 3] = -1


DAMAGE = [nan_support, infinite_query, label_too_large, label_negative]


def learner(algorithm, execution="vmap", loss=None):
    torch.manual_seed(0)
    kwargs = {} if loss is None else {"loss": loss}
    return MetaLearner(MLP((1, 1, 4), WAY, [5]).double(), algorithm, execution=execution, **kwargs)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{type(a).__name__}-{ALGORITHMS.index(a)}")
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_task_is_coded_and_all_other_bits_stay(damage, algorithm, execution):
    subject = learner(algorithm, execution)
    whole = subject.task_gradients(Blobs().episodes(0, range(4)))
    episodes = Blobs().episodes(0, range(4))
    damage(episodes)
    out = subject.task_gradients(episodes)
    assert out.tasks.outcome.tolist() == [0, TaskOutcome.BAD_EPISODE, 0, 0]
    others = [0, 2, 3]
    assert (out.rows[1] == 0).all()
    assert torch.equal(out.rows[others], whole.rows[others])
    assert out.tasks.query_loss[others].equal(whole.tasks.query_loss[others])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{type(a).__name__}-{ALGORITHMS.index(a)}")
def test_the_mean_is_bit_equal_to_one_computed_without_the_bad_task(algorithm):
    """One task at a time, so that leaving a task out changes no other computation."""
    subject, episodes = learner(algorithm, "loop"), Blobs().episodes(0, range(4))
    nan_support(episodes)
    with_bad = subject.meta_gradient(episodes).gradient
    good = [Blobs().episodes(0, range(t, t + 1)) for t in (0, 2, 3)]
    without = subject.meta_gradient(good).gradient
    for name, gradient in without.items():
        assert torch.equal(with_bad[name], gradient), name


def test_running_out_of_memory_costs_the_tasks_and_nothing_else():
    def greedy(outputs, targets):
        if outputs.shape[1] == 12 and bool((targets[0, 0] == 2).any()):
            raise torch.OutOfMemoryError("injected")
        return cross_entropy(outputs, targets)

    subject, episodes = learner(IMAML(0.5, INNER), "loop", greedy), Blobs().episodes(0, range(3))
    episodes.support_y[1, 0] = 2
    out = subject.task_gradients(episodes)
    assert out.tasks.outcome.tolist() == [0, TaskOutcome.OUT_OF_MEMORY, 0]
    assert (out.rows[1] == 0).all()
    assert (out.rows[0] != 0).any()
    mean = subject.meta_gradient(episodes).gradient
    torch.testing.assert_close(subject.layout.flatten(mean), out.rows[[0, 2]].mean(0), rtol=1e-12, atol=1e-14)


def test_tasks_of_several_shapes_are_given_as_several_batches():
    subject = learner(IMAML(0.5, INNER))
    small, large = Blobs(4).episodes(0, range(2)), Blobs(6).episodes(0, range(3))
    together = subject.meta_gradient([small, large])
    rows = torch.cat([subject.task_gradients(small).rows, subject.task_gradients(large).rows])
    torch.testing.assert_close(subject.layout.flatten(together.gradient), rows.mean(0), rtol=1e-12, atol=1e-14)
    assert len(together.tasks.outcome) == 5


def test_regression_targets_that_are_not_finite_are_bad_too():
    from imaml_dist import mean_squared_error

    episodes = Blobs().episodes(0, range(2))
    targets = torch.nn.functional.one_hot(episodes.support_y, WAY).double()
    episodes = dataclasses.replace(episodes, support_y=targets, query_y=targets.clone())
    episodes.query_y[0, 0, 0] = torch.nan
    out = learner(IMAML(0.5, INNER), loss=mean_squared_error).task_gradients(episodes)
    assert out.tasks.outcome.tolist() == [TaskOutcome.BAD_EPISODE, 0]
    assert out.tasks.query_accuracy.isnan().all()
