"""Theorem 1 of the paper: the error of an approximate implicit gradient stays below its bound, with constants known exactly.

With `||phi - phi*|| <= delta` and a linear solve that is delta' away from exact,

    ||g - g*|| <= (lam rho B / mu^2 + lam L / mu) delta + delta'

where mu is the strong convexity of G, rho the Lipschitz constant of the support Hessian, and B and L bound gradient and
Hessian of the query loss (iMAML, theorem 1, which has twice the first term; docs/maths.md proves this one).
"""

from functools import partial

import pytest
import torch
from helpers.algebra import spd
from helpers.problems import Quadratics, dense_hessian, minimise

from imaml_dist.core.implicit import implicit_meta_gradient
from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS, SIZE = 5, 8
IDENTITY = torch.eye(SIZE, dtype=torch.float64)


def _draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gradient(support, query, phi, theta, lam, cg_iterations):
    solve = partial(conjugate_gradient, max_iterations=cg_iterations, rtol=1e-15)
    return implicit_meta_gradient(support, query, phi, theta, proximal=ScalarProximal(lam), solve=solve).gradient


def _times(matrices, rows):
    return torch.einsum("tij,tj->ti", matrices, rows)


@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_on_quadratic_tasks_the_error_stays_below_the_bound(lam):
    """rho = 0, so B does not matter; delta and delta' come from dense algebra."""
    problem, theta = Quadratics.random(TASKS, SIZE, seed=4), _draw(SIZE, seed=5).expand(TASKS, -1)
    shape = spd(TASKS, SIZE, seed=6)  # the query loss's Hessian; another than the support loss's

    def query(phi):
        return 0.5 * torch.einsum("ti,tij,tj->t", phi - problem.target, shape, phi - problem.target)

    system = problem.hessian + lam * IDENTITY
    mu, smooth = torch.linalg.eigvalsh(system)[:, 0], torch.linalg.eigvalsh(shape)[:, -1]
    best = problem.solution(theta, lam)
    exact = lam * torch.linalg.solve(system, _times(shape, best - problem.target))

    tightness = []
    for steps in (0, 1, 4, 16, 64, 256):
        phi = gradient_descent(problem.support_loss, theta, lr=0.08, steps=steps, proximal=ScalarProximal(lam)).params
        delta = (phi - best).norm(dim=1)
        solved = lam * torch.linalg.solve(system, _times(shape, phi - problem.target))
        for cg_iterations in (1, 2, 4, 8, 12):
            found = _gradient(problem.support_loss, query, phi, theta, lam, cg_iterations)
            delta_prime = (found - solved).norm(dim=1)
            error, bound = (found - exact).norm(dim=1), lam * smooth / mu * delta + delta_prime
            assert (error <= bound * (1 + 1e-10) + 1e-12).all(), (steps, cg_iterations)
            tightness.append(float((error / bound).max()))
    assert max(tightness) > 0.5, "a bound that no case comes near to tests nothing"


def test_the_two_errors_are_the_ones_that_the_bound_names():
    """Without inner error the whole error is the linear solve's, and without that it falls with delta."""
    problem, theta, lam = Quadratics.random(TASKS, SIZE, seed=4), _draw(SIZE, seed=5).expand(TASKS, -1), 0.5
    best, exact = problem.solution(theta, lam), problem.meta_gradient(theta, lam)
    errors = [
        float((_gradient(problem.support_loss, problem.query_loss, best, theta, lam, k) - exact).norm())
        for k in (1, 2, 4, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-11 < 1e-2 < errors[0]
    ratios = []
    for steps in (10, 40, 160):
        phi = gradient_descent(problem.support_loss, theta, lr=0.08, steps=steps, proximal=ScalarProximal(lam)).params
        found = _gradient(problem.support_loss, problem.query_loss, phi, theta, lam, 20)
        ratios.append(float(((found - exact).norm(dim=1) / (phi - best).norm(dim=1)).max()))
    mu = float(torch.linalg.eigvalsh(problem.hessian).min()) + lam
    assert max(ratios) <= lam / mu * (1 + 1e-9)


def test_with_a_hessian_that_changes_the_error_stays_below_the_full_bound():
    """Quartic tasks `sum a phi^4 / 12 + b phi`: Hessian `diag(a phi^2)`, which is `2 max(a) r`-Lipschitz on |phi| <= r."""
    lam, a, b = 0.8, _draw(TASKS, SIZE, seed=1).abs() + 0.5, _draw(TASKS, SIZE, seed=2)
    theta, target = 1.5 * _draw(SIZE, seed=3).expand(TASKS, -1), _draw(TASKS, SIZE, seed=4)

    def support(phi):
        return (a * phi**4 / 12 + b * phi).sum(-1)

    def query(phi):
        return 0.5 * ((phi - target) ** 2).sum(-1)

    best = minimise(support, theta, lam)
    exact = lam * torch.linalg.solve(dense_hessian(support, best) + lam * IDENTITY, best - target)
    tightness = []
    for steps in (0, 1, 4, 16, 64):
        phi = gradient_descent(support, theta, lr=0.1, steps=steps, proximal=ScalarProximal(lam)).params
        delta = (phi - best).norm(dim=1)
        radius = torch.maximum(phi.abs().amax(1), best.abs().amax(1))
        rho, mu = 2 * a.amax(1) * radius, lam
        slope = torch.maximum(
            (phi - target).norm(dim=1), (best - target).norm(dim=1)
        )  # B on the segment between the two
        solved = lam * torch.linalg.solve(dense_hessian(support, phi) + lam * IDENTITY, phi - target)
        for cg_iterations in (1, 3, 8, 12):
            found = _gradient(support, query, phi, theta, lam, cg_iterations)
            delta_prime = (found - solved).norm(dim=1)
            bound = (lam * rho * slope / mu**2 + lam / mu) * delta + delta_prime
            error = (found - exact).norm(dim=1)
            assert (error <= bound * (1 + 1e-10) + 1e-12).all(), (steps, cg_iterations)
            tightness.append(float((error / bound).max()))
    assert max(tightness) > 0.5
