"""Bad tasks become codes, are excluded before the reduction, and leave every other bit as it was."""

import dataclasses

import pytest
import torch
from helpers.blobs import WAY, Blobs
from torch import nn

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
from imaml_dist.algorithms.linear import Dual
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.distributed.reduction import tree_sum
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


def too_large(e):
    """Finite, and far too large for the step size: the inner loop runs away, whatever the samples' labels are."""
    e.support_x[1] *= 1e3
    e.support_y[1] = e.support_y[1].roll(1)


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


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{type(a).__name__}-{ALGORITHMS.index(a)}")
def test_the_sum_over_chunks_is_bit_equal_whatever_is_in_the_bad_tasks(algorithm):
    """As workers add: chunks of four in one call, tasks and chunks along a tree. A bad task is a zero in it, whatever it holds."""
    subject = learner(algorithm)

    def total(damage):
        chunks = [Blobs().episodes(0, range(t, t + 4)) for t in (0, 4, 8)]
        damage(chunks[0])
        damage(chunks[2])
        parts = [subject.task_gradients(chunk) for chunk in chunks]
        assert [int(p.accepted.sum()) for p in parts] == ([3, 4, 3] if damage is not nothing else [4, 4, 4])
        return tree_sum(torch.stack([tree_sum(p.rows) for p in parts])), torch.stack([p.rows for p in parts])

    def nothing(chunk):
        pass

    _, rows = total(nothing)
    rows[[0, 2], 1] = 0.0
    expected = tree_sum(torch.stack([tree_sum(chunk) for chunk in rows]))
    for damage in (*DAMAGE, too_large):
        assert torch.equal(total(damage)[0], expected), damage.__name__


@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{type(a).__name__}-{ALGORITHMS.index(a)}")
def test_a_task_that_diverges_changes_no_bit_of_the_healthy_ones_beside_it(algorithm, execution):
    subject = learner(algorithm, execution)
    whole = subject.task_gradients(Blobs().episodes(0, range(4)))
    episodes = Blobs().episodes(0, range(4))
    too_large(episodes)
    out, others = subject.task_gradients(episodes), [0, 2, 3]
    assert out.tasks.outcome.tolist() == [0, TaskOutcome.INNER_DIVERGED, 0, 0]
    assert (out.rows[1] == 0).all()
    assert torch.equal(out.rows[others], whole.rows[others])
    assert out.tasks.query_loss[others].equal(whole.tasks.query_loss[others])
    mean = subject.layout.flatten(subject.meta_gradient(episodes).gradient)
    torch.testing.assert_close(mean, whole.rows[others].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", ["preflight", "bad task"])
def test_how_the_dual_solve_is_computed_does_not_depend_on_what_is_seen_first(first):
    """Outputs of a task that overflow say nothing of whether samples depend on each other; the others must keep their bits."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, WAY)

        def forward(self, x):
            return self.second(torch.softmax(self.first(x.flatten(1)) ** 2, -1))

    def gradients(damage, preflight):
        torch.manual_seed(0)
        subject = MetaLearner(Squared(), IMAML(0.5, GradientDescent(0.05, 3), Dual()), execution="vmap")
        batches = [Blobs().episodes(step, range(4)) for step in (0, 1)]
        batches = [dataclasses.replace(e, support_x=e.support_x.float(), query_x=e.query_x.float()) for e in batches]
        if preflight:
            subject.preflight(batches[1])
        if damage:
            batches[0].support_x[0] *= 1e25
        return [subject.task_gradients(batch) for batch in batches]

    healthy, damaged = gradients(False, True), gradients(True, first == "preflight")
    assert damaged[0].tasks.outcome.tolist() == [TaskOutcome.NON_FINITE, 0, 0, 0]
    assert torch.equal(damaged[0].rows[1:], healthy[0].rows[1:])
    assert torch.equal(damaged[1].rows, healthy[1].rows), "nor for later steps"


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
