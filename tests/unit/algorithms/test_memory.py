"""What happens where tasks do not fit into memory together, and why it changes nothing."""

import weakref

import pytest
import torch
from helpers.kernels import GROUPS_KEEP_BITS, NATIVE

from imaml_dist import IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.algorithms.record import TaskRecord
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.models.conv4 import Conv4

TASKS, WAY = 9, 3
EXECUTIONS = [pytest.param("vmap", marks=GROUPS_KEEP_BITS), pytest.param("native", marks=NATIVE)]


@pytest.fixture
def one_thread():
    """Small work is shared out at a loss, and on a busy machine at a great one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner(execution, operator="gauss_newton"):
    torch.manual_seed(0)
    algorithm = IMAML(0.5, GradientDescent(lr=0.1, steps=3), ConjugateGradient(max_iterations=3, operator=operator))
    return MetaLearner(Conv4((1, 28, 28), WAY, channels=8), algorithm, execution=execution)


def episodes():
    x = torch.rand(TASKS, WAY, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    y = torch.arange(WAY).expand(TASKS, -1)
    return EpisodeBatch(x, y, x.flip(-1), y, index=torch.arange(TASKS))


def limited(subject, most, monkeypatch):
    """Memory for `most` tasks at once."""
    ours, sizes = subject._compute, []

    def compute(usable, *rest):
        sizes.append(len(usable))
        if len(usable) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ours(usable, *rest)

    monkeypatch.setattr(subject, "_compute", compute)
    return sizes


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_task_has_the_same_bits_with_any_number_of_others_from_two_on(execution, operator):
    subject = learner(execution, operator)
    whole = subject.task_gradients(episodes())
    for size in (2, 3, 4, 8):
        for begin in range(0, TASKS - size + 1, size):
            part = subject.task_gradients(episodes()[begin : begin + size])
            assert torch.equal(part.rows, whole.rows[begin : begin + size]), (size, begin)
            assert torch.equal(part.tasks.to_rows(), whole.tasks.to_rows()[begin : begin + size])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("most", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_where_memory_does_not_do_for_all_they_are_computed_in_parts_with_the_same_bits(execution, most, monkeypatch):
    expected = learner(execution).task_gradients(episodes())
    subject = learner(execution)
    sizes = limited(subject, most, monkeypatch)
    found = subject.task_gradients(episodes())
    if most >= 3:  # nine tasks end up in threes and twos
        assert (found.tasks.outcome == int(TaskOutcome.OK)).all()
        assert torch.equal(found.rows, expected.rows)
    assert min(sizes) >= 2
    failed, tried = {size for size in sizes if size > most}, len(sizes)
    again = subject.task_gradients(episodes())
    assert torch.equal(again.rows, found.rows)
    if most >= 3:
        assert not failed & set(sizes[tried:])  # what did not fit is not tried again


def test_what_the_failed_call_held_is_free_before_anything_is_allocated_for_lost_tasks(monkeypatch):
    subject, held, alive = learner("vmap"), [], []

    def compute(usable, *rest):
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def lost(*given, ours=TaskRecord.lost):
        alive.extend(reference() for reference in held)
        return ours(*given)

    monkeypatch.setattr(subject, "_compute", compute)
    monkeypatch.setattr(TaskRecord, "lost", lost)
    subject.task_gradients(episodes()[:2])
    assert alive == [None]


def test_two_tasks_that_do_not_fit_are_lost_and_counted(monkeypatch):
    subject = learner("vmap")
    limited(subject, 1, monkeypatch)
    found = subject.task_gradients(episodes())
    assert (found.tasks.outcome == int(TaskOutcome.OUT_OF_MEMORY)).all()
    assert (found.rows == 0).all()
