"""The exact Gauss-Newton solve in the dual against dense algebra, for losses and networks of every structure."""

import pytest
import torch
from helpers.problems import dense_gauss_newton
from torch import nn

from imaml_dist.algorithms.loss import cross_entropy, mean_squared_error
from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.core.curvature import GaussNewton
from imaml_dist.core.linear.dual import dual_gauss_newton
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.models.functional import FunctionalModel

TASKS, WAY, SHOT = 3, 4, 2


def coupled(outputs, labels):
    """A loss in which the samples of a task do not stand alone."""
    return cross_entropy(outputs, labels) + 0.3 * outputs.mean(1).square().sum(-1)


def barely_coupled(outputs, labels):
    """The same, where it is easily overlooked."""
    return cross_entropy(outputs, labels) + 1e-8 * outputs.mean(1).square().sum(-1)


def saddle(outputs, labels):
    """Not convex in the outputs: S has negative eigenvalues."""
    return cross_entropy(outputs, labels) - 0.05 * outputs.square().sum(-1).mean(-1)


def network(kind):
    torch.manual_seed(1)
    norm = {"plain": nn.Identity(), "layer": nn.LayerNorm(6), "batch": nn.BatchNorm1d(6, track_running_stats=False)}
    return nn.Sequential(nn.Linear(5, 6), norm[kind], nn.Tanh(), nn.Linear(6, WAY)).double()


def problem(kind, loss, tasks=TASKS):
    functional = FunctionalModel(network(kind))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, WAY * SHOT, 5, generator=generator, dtype=torch.float64)
    y = torch.arange(WAY).repeat_interleave(SHOT).repeat(tasks, 1)
    if loss is mean_squared_error:
        y = torch.randn(tasks, WAY * SHOT, WAY, generator=generator, dtype=torch.float64)
    noise = torch.randn(tasks, functional.layout.size, generator=generator, dtype=torch.float64)
    return TaskProblem(functional, loss, functional.parameters() + 0.3 * noise, Samples(x, y), Samples(x, y)), noise


@pytest.mark.parametrize("loss", [cross_entropy, mean_squared_error, coupled, barely_coupled, saddle])
@pytest.mark.parametrize("kind", ["plain", "layer", "batch"])
def test_it_equals_the_dense_solve(kind, loss):
    task, b = problem(kind, loss)
    at, x = task.anchor, task.support.x
    dense = dense_gauss_newton(
        lambda params: task.functional.predict(params, x), lambda outputs: loss(outputs, task.support.y), at
    )
    matrix = dense + (0.5 + 0.1) * torch.eye(at.shape[1], dtype=torch.float64)
    solution = dual_gauss_newton(ProximalSystem(task.gauss_newton(at), ScalarProximal(0.5), damping=0.1), b)
    expected = torch.linalg.solve(matrix, b)
    assert float(((solution.value - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-11
    assert (solution.outcome == Outcome.CONVERGED).all()
    recomputed = (b - torch.einsum("tij,tj->ti", matrix, solution.value)).norm(dim=1) / b.norm(dim=1)
    assert float((solution.residual - recomputed).abs().max()) < 1e-10


def test_the_rank_for_cross_entropy_is_one_below_the_classes_for_every_sample():
    for kind in ("plain", "batch"):
        task, _ = problem(kind, cross_entropy)
        factors, d = task.gauss_newton(task.anchor).factors()
        assert factors.shape[1] == d.shape[1] == WAY * SHOT * (WAY - 1)
        product = torch.einsum("trp,tr,trq->tpq", factors, d, factors)
        assert int(torch.linalg.matrix_rank(product[0])) <= d.shape[1]


def test_a_broken_task_leaves_the_others_their_bits():
    task, b = problem("plain", cross_entropy)
    expected = dual_gauss_newton(ProximalSystem(task.gauss_newton(task.anchor), ScalarProximal(0.5)), b)
    broken = task.anchor.clone()
    broken[1] = torch.nan
    found = dual_gauss_newton(ProximalSystem(task.gauss_newton(broken), ScalarProximal(0.5)), b)
    assert found.outcome.tolist() == [Outcome.CONVERGED, Outcome.NON_FINITE, Outcome.CONVERGED]
    assert not found.value[1].any()
    assert torch.equal(found.value[[0, 2]], expected.value[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, 8.0, 30.0])
def test_samples_that_are_sure_of_their_class_are_not_coupled(scale):
    """Their blocks are cancellation alone; what another task's are must not change how a task is computed."""
    task, b = problem("plain", cross_entropy)
    at = task.anchor.float()
    at[1, -WAY:] += torch.tensor([scale, 0.0, 0.0, 0.0])  # the biases of the outputs

    def solve(tasks):
        x, y = task.support.x.float()[tasks], task.support.y[tasks]
        functional = FunctionalModel(network("plain").float())
        asked = []

        def each(params):
            asked.append(1)
            return functional.predict(params, x.flatten(0, 1).unsqueeze(1)).flatten(0, 1)

        matrix = GaussNewton(lambda p: functional.predict(p, x), lambda o: cross_entropy(o, y), at[tasks], each)
        return dual_gauss_newton(ProximalSystem(matrix, ScalarProximal(0.1)), b.float()[tasks]), len(asked)

    (together, fast), (alone, _) = solve([0, 1, 2]), solve([0])
    assert fast, "samples were taken for coupled"
    torch.testing.assert_close(together.value[0], alone.value[0], rtol=1e-4, atol=1e-4)
    assert (together.outcome == Outcome.CONVERGED).all()


def test_misuse_is_refused():
    task, b = problem("plain", cross_entropy)
    with pytest.raises(ValueError, match="needs a Gauss-Newton operator"):
        dual_gauss_newton(ProximalSystem(lambda v: v, ScalarProximal(0.5)), b)
    operator = task.gauss_newton(task.anchor)
    assert isinstance(operator, GaussNewton)
    with pytest.raises(torch.OutOfMemoryError, match="larger than"):
        operator.factors(max_bytes=1000)
