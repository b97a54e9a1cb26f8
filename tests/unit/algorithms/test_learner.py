"""The meta-learner: the same gradients however tasks are executed, excluded tasks change nothing, torch optimisers work."""

import pytest
import torch
from helpers.blobs import WAY, Blobs
from helpers.kernels import NATIVE

from imaml_dist import (
    FOMAML,
    IMAML,
    ConjugateGradient,
    GradientDescent,
    MetaLearner,
    TaskOutcome,
    evaluate,
)
from imaml_dist.algorithms.record import NO_SOLVE, TaskRecord
from imaml_dist.core.linear.solution import Outcome, relative_residual
from imaml_dist.kernels import native
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.episode import EpisodeBatch


def learner(algorithm=None, execution="vmap"):
    torch.manual_seed(0)
    return MetaLearner(MLP((1, 1, 4), WAY, [6]).double(), algorithm or IMAML(lam=0.5), execution=execution)


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_meta_gradient_is_that_of_the_core_with_dense_curvature(operator):
    """The learner's gradient against the formula, with J'SJ or H written out as a dense matrix for every task."""
    lam, subject = 3.0, learner(IMAML(3.0, solver=ConjugateGradient(max_iterations=80, rtol=1e-14, operator=operator)))
    episodes = Blobs().episodes(0, range(3))
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    rows = subject.task_gradients(episodes).rows
    for t in range(3):

        def outputs(row, t=t):
            return subject.functional.predict(row[None], episodes.support_x[t : t + 1])[0]

        def loss(z, t=t):
            return torch.nn.functional.cross_entropy(z, episodes.support_y[t])

        if operator == "hessian":
            dense = torch.autograd.functional.hessian(lambda row: loss(outputs(row)), phi[t])
        else:
            z = outputs(phi[t])
            s = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
            j = torch.autograd.functional.jacobian(outputs, phi[t]).reshape(z.numel(), -1)
            dense = j.T @ s @ j
        row = phi[t].clone().requires_grad_(True)
        query = torch.nn.functional.cross_entropy(
            subject.functional.predict(row[None], episodes.query_x[t : t + 1])[0], episodes.query_y[t]
        )
        (v,) = torch.autograd.grad(query, row)
        expected = lam * torch.linalg.solve(dense + lam * torch.eye(len(v), dtype=torch.float64), v)
        torch.testing.assert_close(rows[t], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", [IMAML(0.5), FOMAML()])
def test_execution_paths_agree(algorithm):
    episodes = Blobs().episodes(0, range(4))
    vmapped, looped = (learner(algorithm, e).task_gradients(episodes) for e in ("vmap", "loop"))
    torch.testing.assert_close(vmapped.rows, looped.rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vmapped.tasks.to_rows(), looped.tasks.to_rows(), rtol=1e-8, atol=1e-10, equal_nan=True)


@NATIVE
def test_native_execution_computes_a_convolutional_network_by_our_kernels(monkeypatch):
    calls = []
    for name in ("conv2d", "batch_norm"):
        ours = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, ours=ours, name=name, **kw: calls.append(name) or ours(*a, **kw))
    x, y = torch.randn(3, 6, 1, 28, 28, dtype=torch.float64), torch.arange(3).repeat(3, 2)
    episodes, found = EpisodeBatch(x, y, x + 0.1, y, index=torch.arange(3)), {}
    for execution in ("native", "vmap", "loop"):
        torch.manual_seed(0)
        subject = MetaLearner(Conv4((1, 28, 28), WAY, 5).double(), IMAML(0.5), execution=execution)
        found[execution] = subject.task_gradients(episodes)
        assert set(calls) == ({"conv2d", "batch_norm"} if execution == "native" else set())
        calls.clear()
    for execution in ("vmap", "loop"):
        torch.testing.assert_close(found["native"].rows, found[execution].rows, rtol=1e-8, atol=1e-10)


def test_record_tells_how_every_solve_went():
    record = learner().task_gradients(Blobs().episodes(0, range(4))).tasks
    assert (record.outcome == TaskOutcome.OK).all()
    assert (record.cg_iterations == 5).all()
    assert (record.cg_residual > 0).all()
    assert (record.cosine > 0).all()
    assert (record.cosine < 1).all()
    assert (record.stationarity < 1).all()
    first_order = learner(FOMAML()).task_gradients(Blobs().episodes(0, range(4))).tasks
    assert (first_order.cg_outcome == NO_SOLVE).all()
    torch.testing.assert_close(first_order.cosine, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(TaskRecord.from_rows(record.to_rows()).distance, record.distance)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_the_residual_recorded_under_autocast_is_the_true_one(execution):
    true = []

    class Watched(ConjugateGradient):
        def solve(self, system, v):
            found = super().solve(system, v)
            true.append(relative_residual(system, v, found.value))
            return found

    torch.manual_seed(0)
    algorithm = IMAML(0.5, GradientDescent(0.3, 5), Watched(max_iterations=8))
    subject = MetaLearner(Conv4((1, 28, 28), WAY, 5), algorithm, execution=execution, autocast=torch.bfloat16)
    x, y = torch.randn(3, 6, 1, 28, 28), torch.arange(3).repeat(3, 2)
    record = subject.task_gradients(EpisodeBatch(x, y, x + 0.1, y, index=torch.arange(3))).tasks
    torch.testing.assert_close(record.cg_residual, torch.cat(true), rtol=1e-4, atol=0)


def test_a_bad_task_is_excluded_and_changes_nothing_else():
    episodes = Blobs().episodes(0, range(4))
    whole = learner().task_gradients(episodes)
    episodes.support_x[0, 0] = torch.nan
    with_bad = learner().task_gradients(episodes)
    assert with_bad.tasks.outcome.tolist() == [TaskOutcome.BAD_EPISODE, 0, 0, 0]
    assert torch.equal(with_bad.rows[1:], whole.rows[1:]), "the other tasks keep their bits"
    assert (with_bad.rows[0] == 0).all()
    mean = learner().meta_gradient(episodes).gradient
    vector = learner().functional.layout.flatten(mean)
    torch.testing.assert_close(vector, whole.rows[1:].mean(0), rtol=1e-12, atol=1e-14)


def test_a_solve_that_is_not_finite_excludes_its_task():
    """`|o - y|^1.5` has a finite gradient and an infinite curvature where it is fitted exactly."""

    def kinked(outputs, targets):
        return (outputs - outputs.detach()).abs().pow(1.5).mean((1, 2)) + 0.01 * outputs.square().mean((1, 2))

    torch.manual_seed(0)
    solver = ConjugateGradient(operator="hessian")
    subject = MetaLearner(MLP((1, 1, 4), WAY, []).double(), IMAML(0.5, GradientDescent(0.1, 1), solver), kinked)
    out = subject.task_gradients(Blobs().episodes(0, range(2)))
    assert (out.tasks.cg_outcome == Outcome.NON_FINITE).all()
    assert (out.tasks.outcome == TaskOutcome.NON_FINITE).all()
    assert (out.rows == 0).all()


def test_gauss_newton_fallback_is_the_gauss_newton_gradient_and_stays_counted():
    """Tasks whose Hessian is indefinite: with the fallback exactly those get what the Gauss-Newton operator gives."""

    def gradients(operator, policy):
        torch.manual_seed(3)
        solver = ConjugateGradient(max_iterations=40, operator=operator, on_negative_curvature=policy)
        subject = MetaLearner(MLP((1, 1, 4), WAY, [6]).double(), IMAML(0.005, GradientDescent(0.1, 2), solver))
        return subject.task_gradients(Blobs().episodes(0, range(8)))

    hessian, fallback = gradients("hessian", "truncate"), gradients("hessian", "gauss_newton")
    gauss_newton = gradients("gauss_newton", "truncate")
    negative = hessian.tasks.cg_outcome == Outcome.NEGATIVE_CURVATURE
    assert negative.any()
    assert torch.equal(fallback.tasks.cg_outcome == Outcome.NEGATIVE_CURVATURE, negative)
    torch.testing.assert_close(fallback.rows[negative], gauss_newton.rows[negative], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fallback.tasks.cg_residual[negative], gauss_newton.tasks.cg_residual[negative])
    assert not torch.allclose(fallback.rows[negative], hessian.rows[negative])
    torch.testing.assert_close(fallback.rows[~negative], hessian.rows[~negative], rtol=0, atol=0)


def test_diverging_inner_loops_are_coded():
    record = learner(IMAML(0.5, GradientDescent(lr=1e4))).task_gradients(Blobs().episodes(0, range(3)))
    assert (record.tasks.outcome != TaskOutcome.OK).all()
    assert (record.rows == 0).all()


def _concave(outputs, targets):
    return -((outputs - torch.nn.functional.one_hot(targets, WAY)) ** 2).mean((1, 2)) * 0.05


@pytest.mark.parametrize("policy", ["truncate", "gauss_newton", "exclude"])
def test_negative_curvature_policies(policy):
    """A concave loss meets negative curvature at once; squared error's own Gauss-Newton is then negative too."""
    solver = ConjugateGradient(operator="hessian", on_negative_curvature=policy)
    torch.manual_seed(0)
    subject = MetaLearner(MLP((1, 1, 4), WAY, []).double(), IMAML(0.001, GradientDescent(0.01, 1), solver), _concave)
    out = subject.task_gradients(Blobs().episodes(0, range(2)))
    if policy == "exclude":
        assert (out.tasks.outcome == TaskOutcome.SOLVE_FAILED).all()
        assert (out.rows == 0).all()
    else:
        assert (out.tasks.cg_outcome == 2).all()
        torch.testing.assert_close(out.tasks.cosine, torch.ones(2, dtype=torch.float64))


def test_backward_feeds_any_torch_optimiser_and_training_helps():
    subject, source = learner(IMAML(0.5, GradientDescent(0.3, 5))), Blobs()
    before = evaluate(subject, source, tasks=40)
    optimiser = torch.optim.Adam(subject.model.parameters(), lr=1e-2)
    for step in range(1, 41):
        optimiser.zero_grad()
        subject.backward(source.episodes(step, range(4)))
        optimiser.step()
    after = evaluate(subject, source, tasks=40)
    assert after.mean - after.ci95 > before.mean + before.ci95


def test_backward_accumulates_as_torch_does():
    subject, episodes = learner(), Blobs().episodes(0, range(2))
    subject.backward(episodes)
    first = {n: p.grad.clone() for n, p in subject.model.named_parameters()}
    subject.backward(episodes)
    for name, parameter in subject.model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])


def test_adapt_returns_an_ordinary_module_and_leaves_the_model_alone():
    subject, episodes = learner(), Blobs().episodes(0, range(2))
    theta = subject.functional.parameters()
    adapted = subject.adapt(episodes.support_x[1], episodes.support_y[1])
    torch.testing.assert_close(subject.functional.parameters(), theta, rtol=0, atol=0)
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params[1]
    expected = subject.functional.predict(phi[None], episodes.query_x[1:])[0]
    torch.testing.assert_close(adapted(episodes.query_x[1]), expected, rtol=1e-12, atol=1e-12)
