"""Gradient descent on the proximal problem against the closed form of its iterates and of its limit."""

import pytest
import torch
from helpers.problems import Quadratics

from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS, SIZE = 3, 6


def _setting():
    theta = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(TASKS, -1)
    return Quadratics.random(TASKS, SIZE, seed=9), theta


def test_the_proximal_term_is_in_every_step():
    """`phi_k - phi* = (I - lr (H + lam I))^k (theta - phi*)`, which no single pull-back at the end can give."""
    problem, theta = _setting()
    lam, lr, steps = 0.8, 0.1, 5
    limit = problem.solution(theta, lam)
    contraction = torch.eye(SIZE, dtype=torch.float64) * (1 - lr * lam) - lr * problem.hessian
    expected = limit + torch.einsum("tij,tj->ti", torch.linalg.matrix_power(contraction, steps), theta - limit)
    found = gradient_descent(problem.support_loss, theta, lr=lr, steps=steps, proximal=ScalarProximal(lam))
    torch.testing.assert_close(found.params, expected, rtol=1e-13, atol=1e-13)
    assert (found.steps == steps).all()


def test_stationarity_is_the_ratio_of_gradient_norms_of_the_proximal_objective():
    problem, theta = _setting()
    lam = 0.8
    found = gradient_descent(problem.support_loss, theta, lr=0.1, steps=3, proximal=ScalarProximal(lam))
    gradient = lambda phi: torch.einsum("tij,tj->ti", problem.hessian, phi) - problem.linear  # noqa: E731
    end = gradient(found.params) + lam * (found.params - theta)
    torch.testing.assert_close(found.stationarity, end.norm(dim=1) / gradient(theta).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.loss, problem.support_loss(found.params), rtol=1e-13, atol=0)


def test_without_a_proximal_term_it_is_plain_gradient_descent():
    problem, theta = _setting()
    found = gradient_descent(problem.support_loss, theta, lr=0.1, steps=1)
    expected = theta - 0.1 * (torch.einsum("tij,tj->ti", problem.hessian, theta) - problem.linear)
    torch.testing.assert_close(found.params, expected, rtol=1e-14, atol=1e-14)


def test_divergence_and_non_finite_losses_are_outcomes_of_their_own_tasks():
    problem, theta = _setting()
    scale = torch.ones(TASKS, 1, 1, dtype=torch.float64)
    scale[1] = 1e3
    steep = Quadratics(problem.hessian * scale, problem.linear, problem.target)
    broken = Quadratics(steep.hessian, steep.linear.clone().index_fill_(0, torch.tensor([2]), torch.nan), steep.target)
    found = gradient_descent(broken.support_loss, theta, lr=0.1, steps=4)
    assert found.outcome.tolist() == [TaskOutcome.OK, TaskOutcome.INNER_DIVERGED, TaskOutcome.NON_FINITE]
    alone = gradient_descent(problem.support_loss, theta, lr=0.1, steps=4)
    torch.testing.assert_close(found.params[0], alone.params[0], rtol=0, atol=0)


@pytest.mark.parametrize(("lr", "steps", "word"), [(0.0, 1, "lr"), (-0.1, 1, "lr"), (0.1, -1, "steps")])
def test_misuse_is_refused(lr, steps, word):
    problem, theta = _setting()
    with pytest.raises(ValueError, match=word):
        gradient_descent(problem.support_loss, theta, lr=lr, steps=steps)
