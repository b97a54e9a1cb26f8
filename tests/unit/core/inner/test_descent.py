"""The descent loop: where each task stops, what a broken one does to the others, and mini-batches."""

import pytest
import torch
from helpers.problems import Quadratics, TanhRegression, dense_hessian

from imaml_dist.core.curvature import gauss_newton_operator, linearise_hessian
from imaml_dist.core.inner.adam import AdamRule
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.gradient_descent import GradientDescentRule
from imaml_dist.core.inner.momentum import MomentumRule
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS, SIZE, LAM = 4, 6, 0.5


def _theta(size=SIZE):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(TASKS, -1)


def _uneven():
    """Four quadratics whose curvatures differ tenfold, so that they converge at different speeds."""
    problem = Quadratics.random(TASKS, SIZE, seed=9)
    scale = torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    return Quadratics(problem.hessian * scale[:, None, None], problem.linear, problem.target)


def _counted(objective):
    calls = []

    def counted(phi):
        calls.append(1)
        return objective(phi)

    return counted, calls


@pytest.mark.parametrize("rule", [GradientDescentRule(0.1), MomentumRule(0.05), AdamRule(0.05)], ids=type)
def test_tasks_stop_at_different_steps_and_equal_what_they_get_alone(rule):
    problem, theta = _uneven(), _theta()
    together = descend(problem.support_loss, theta, rule, steps=2000, tolerance=1e-4, proximal=ScalarProximal(LAM))
    assert len(set(together.steps.tolist())) >= 3
    assert int(together.steps.max()) < 2000
    assert (together.stationarity <= 1e-4).all()
    for t in range(TASKS):
        row = slice(t, t + 1)
        one = Quadratics(problem.hessian[row], problem.linear[row], problem.target[row])
        alone = descend(one.support_loss, theta[row], rule, steps=2000, tolerance=1e-4, proximal=ScalarProximal(LAM))
        assert alone.steps[0] == together.steps[t]
        torch.testing.assert_close(together.params[t], alone.params[0], rtol=1e-12, atol=1e-13)
        before = descend(one.support_loss, theta[row], rule, steps=int(alone.steps) - 1, proximal=ScalarProximal(LAM))
        assert before.stationarity > 1e-4, "it should have stopped a step earlier"


def test_one_gradient_a_step_and_one_at_the_end():
    problem, theta = _uneven(), _theta()
    objective, calls = _counted(problem.support_loss)
    descend(objective, theta, GradientDescentRule(0.1), steps=7)
    assert len(calls) == 8
    objective, calls = _counted(problem.support_loss)
    stopped = descend(
        objective, theta, GradientDescentRule(0.1), steps=5000, tolerance=1e-3, proximal=ScalarProximal(LAM)
    )
    assert len(calls) == int(stopped.steps.max()) + 1


def test_a_stationary_start_needs_no_step_and_without_a_tolerance_only_steps_count():
    problem, theta = _uneven(), _theta()
    minimum = torch.linalg.solve(problem.hessian, problem.linear)
    start = torch.where(torch.arange(TASKS)[:, None] == 2, minimum, theta)
    flat = Quadratics(torch.zeros_like(problem.hessian), torch.zeros_like(problem.linear), problem.target)
    assert descend(flat.support_loss, theta, GradientDescentRule(0.1), steps=3, tolerance=0.1).steps.tolist() == [0] * 4
    assert descend(flat.support_loss, theta, GradientDescentRule(0.1), steps=3).steps.tolist() == [3] * 4
    found = descend(problem.support_loss, start, GradientDescentRule(0.1), steps=5)
    assert float((found.params[2] - minimum[2]).norm()) < 1e-12


@pytest.mark.parametrize("rule", [GradientDescentRule(0.05), MomentumRule(0.05), AdamRule(0.05)], ids=type)
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_a_task_that_is_not_finite_changes_no_bit_of_the_others(rule, tolerance):
    problem, theta = TanhRegression.random(TASKS, seed=2), _theta(13)
    healthy = descend(problem.support_loss, theta, rule, steps=20, tolerance=tolerance)
    x = problem.support_x.clone()
    x[1, 3] = torch.nan
    broken_problem = TanhRegression(x, problem.support_y, problem.query_x, problem.query_y)
    broken = descend(broken_problem.support_loss, theta, rule, steps=20, tolerance=tolerance)
    others = [0, 2, 3]
    assert torch.equal(broken.params[others], healthy.params[others])
    assert torch.equal(broken.stationarity[others], healthy.stationarity[others])
    assert torch.equal(broken.steps[others], healthy.steps[others])
    assert broken.outcome.tolist() == [0, TaskOutcome.NON_FINITE, 0, 0]
    assert broken.params[1].isfinite().all()
    assert broken.steps[1] == 0


def test_a_task_that_becomes_infinite_on_the_way_is_frozen_there():
    """With H = 1e80 I and lr = 1 the iterates are (1 - 1e80)^k theta: 1e240 after three steps, infinite after four."""
    scale = torch.tensor([1e80, 0.5], dtype=torch.float64)

    def objective(phi):
        return 0.5 * scale * (phi * phi).sum(-1)

    found = descend(objective, torch.ones(2, 3, dtype=torch.float64), GradientDescentRule(1.0), steps=6)
    assert found.outcome.tolist() == [TaskOutcome.NON_FINITE, TaskOutcome.OK]
    assert found.params.isfinite().all()
    torch.testing.assert_close(found.params[1], torch.full((3,), 0.5**6, dtype=torch.float64), rtol=0, atol=0)
    assert found.steps[1] == 6
    assert found.steps[0] < 6


def test_a_gradient_that_is_not_finite_where_the_loss_is_breaks_its_task():
    """`sqrt |phi|` from 1 with rate 2 arrives exactly at 0, where its loss is 0 and its derivative does not exist."""

    def objective(phi):
        return torch.where(torch.tensor([[True], [False]]), phi.abs().sqrt(), phi**2 / 8).sum(-1)

    for steps in (1, 3):
        found = descend(objective, torch.ones(2, 1, dtype=torch.float64), GradientDescentRule(2.0), steps=steps)
        assert found.outcome.tolist() == [TaskOutcome.NON_FINITE, TaskOutcome.OK]
        assert found.params.flatten().tolist() == [0.0, 0.5**steps]
        assert found.steps.tolist() == [1, steps]


def test_mini_batches_take_turns_and_both_ends_are_measured_on_the_whole():
    problem, theta = _uneven(), _theta()
    generator = torch.Generator().manual_seed(3)
    shifts = [torch.randn(TASKS, SIZE, dtype=torch.float64, generator=generator) for _ in range(3)]
    batches = [lambda phi, s=shift: problem.support_loss(phi) + (s * phi).sum(-1) for shift in shifts]
    found = descend(
        problem.support_loss, theta, GradientDescentRule(0.1), steps=5, batches=batches, proximal=ScalarProximal(LAM)
    )
    gradient = lambda phi: torch.einsum("tij,tj->ti", problem.hessian, phi) - problem.linear  # noqa: E731
    phi = theta
    for step in range(5):
        phi = phi - 0.1 * (gradient(phi) + shifts[step % 3] + LAM * (phi - theta))
    torch.testing.assert_close(found.params, phi, rtol=1e-13, atol=1e-13)
    end = gradient(phi) + LAM * (phi - theta)
    torch.testing.assert_close(found.stationarity, end.norm(dim=1) / gradient(theta).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.loss, problem.support_loss(phi), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1, "tolerance": -0.1}, "tolerance"),
        ({"steps": 1, "tolerance": 1.0}, "tolerance"),
        ({"steps": 1, "batches": []}, "batches"),
        ({"steps": 1, "batches": [lambda phi: phi.sum(-1)], "tolerance": 0.1}, "batches"),
    ],
)
def test_misuse_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        descend(_uneven().support_loss, _theta(), GradientDescentRule(0.1), **wrong)
    with pytest.raises(ValueError, match="anchor"):
        descend(_uneven().support_loss, _theta()[0], GradientDescentRule(0.1), steps=1)


def _linearise(problem, objective, operator):
    """Its objective counts the passes."""
    if operator == "hessian":
        return lambda phi: linearise_hessian(objective, phi)
    predict, loss = (lambda p: problem.predict(p, problem.support_x)), problem.mean_squared_error
    return lambda phi: gauss_newton_operator(predict, lambda o: loss(o, problem.support_y), phi).linearised()


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_last_gradient_comes_with_the_curvature_at_phi(operator, steps):
    problem, theta = TanhRegression.random(TASKS, seed=5), _theta(13)
    objective, calls = _counted(problem.support_loss)
    options = {"steps": steps, "proximal": ScalarProximal(LAM)}
    rule = GradientDescentRule(0.05)
    found = descend(objective, theta, rule, **options, linearise=_linearise(problem, objective, operator))
    assert len(calls) <= steps + 1
    plain = descend(problem.support_loss, theta, rule, **options)
    torch.testing.assert_close(found.params, plain.params, rtol=0, atol=0)
    torch.testing.assert_close(found.stationarity, plain.stationarity, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-14, atol=0)
    v = _theta(13) + 1
    expected = dense_hessian(problem.support_loss, found.params) @ v[..., None]
    if operator == "gauss_newton":
        jacobian = torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda row, one=problem.task(t): one.predict(row[None], one.support_x).flatten(), found.params[t]
                )
                for t in range(TASKS)
            ]
        )
        expected = (2 / jacobian.shape[1]) * jacobian.mT @ jacobian @ v[..., None]
    torch.testing.assert_close(found.curvature(v), expected[..., 0], rtol=1e-11, atol=1e-12)


def test_no_curvature_is_handed_on_where_all_tasks_stopped_early_and_none_of_another_point():
    problem, theta = _uneven(), _theta()
    options = {"steps": 4000, "tolerance": 1e-3, "proximal": ScalarProximal(LAM)}
    linearise = _linearise(problem, problem.support_loss, "hessian")
    found = descend(problem.support_loss, theta, GradientDescentRule(0.1), **options, linearise=linearise)
    assert (found.steps < 4000).all()
    assert found.curvature is None
    assert descend(problem.support_loss, theta, GradientDescentRule(0.1), steps=3).curvature is None
