"""The implicit meta-gradient against closed forms and against central differences through the whole inner solve."""

from functools import partial

import pytest
import torch
from helpers.problems import Quadratics, TanhRegression, dense_hessian, minimise, minimise_with

from imaml_dist.core.implicit import implicit_meta_gradient
from imaml_dist.core.inner.gradient_descent import gradient_descent
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS = 4
SOLVE = partial(conjugate_gradient, max_iterations=60, rtol=1e-15)


def _theta(size, seed=7, scale=1.0):
    return scale * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).expand(
        TASKS, -1
    )


def test_quadratic_tasks_have_the_meta_gradient_of_the_closed_form():
    problem, theta, lam = Quadratics.random(TASKS, 10, seed=1), _theta(10), 0.7
    phi = problem.solution(theta, lam)
    found = implicit_meta_gradient(
        problem.support_loss, problem.query_loss, phi, theta, proximal=ScalarProximal(lam), solve=SOLVE
    )
    expected = problem.meta_gradient(theta, lam)
    assert float((found.gradient - expected).norm() / expected.norm()) < 1e-12


def test_gradient_descent_and_the_implicit_gradient_together_reach_the_closed_form():
    """The whole chain: inner solve by our own solver, then the linear solve."""
    problem, theta, lam = Quadratics.random(TASKS, 10, seed=2), _theta(10), 0.7
    inner = gradient_descent(problem.support_loss, theta, lr=0.15, steps=600, proximal=ScalarProximal(lam))
    assert float(inner.stationarity.max()) < 1e-13
    found = implicit_meta_gradient(
        problem.support_loss, problem.query_loss, inner.params, theta, proximal=ScalarProximal(lam), solve=SOLVE
    )
    expected = problem.meta_gradient(theta, lam)
    assert float((found.gradient - expected).norm() / expected.norm()) < 1e-12


def test_indefinite_tanh_network_agrees_with_central_differences_through_the_inner_solve():
    problem, theta, lam = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), 1.0
    phi = minimise(problem.support_loss, theta, lam)
    spectrum = torch.linalg.eigvalsh(dense_hessian(problem.support_loss, phi))
    assert float(spectrum.min()) < -0.05, "the Hessian itself must be indefinite for this test to say anything"
    assert float(spectrum.min()) + lam > 0.1

    found = implicit_meta_gradient(
        problem.support_loss, problem.query_loss, phi, theta, proximal=ScalarProximal(lam), solve=SOLVE
    )
    assert (found.solution.outcome == Outcome.CONVERGED).all() or float(found.solution.residual.max()) < 1e-12

    step, columns, matrix = 1e-4, [], lam * torch.eye(13, dtype=torch.float64)
    for i in range(13):
        shift = torch.zeros(13, dtype=torch.float64)
        shift[i] = 1.0

        def outer(size, shift=shift):
            return problem.query_loss(minimise_with(problem.support_loss, theta + size * shift, matrix, start=phi))

        # Fourth order, so that truncation lies below the 1e-8 that is asked for.
        columns.append((8 * (outer(step) - outer(-step)) - (outer(2 * step) - outer(-2 * step))) / (12 * step))
    expected = torch.stack(columns, dim=1)
    assert float((found.gradient - expected).norm() / expected.norm()) < 1e-8


def test_lambda_gradient_agrees_with_central_differences():
    problem, theta, lam, step = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), 1.0, 1e-4
    phi = minimise(problem.support_loss, theta, lam)
    proximal = ScalarProximal(lam)
    found = implicit_meta_gradient(problem.support_loss, problem.query_loss, phi, theta, proximal=proximal, solve=SOLVE)

    def outer(value):
        matrix = value * torch.eye(13, dtype=torch.float64)
        return problem.query_loss(minimise_with(problem.support_loss, theta, matrix, start=phi))

    near, far = (outer(lam + size) - outer(lam - size) for size in (step, 2 * step))
    torch.testing.assert_close(found.own["lam"], (8 * near - far) / (12 * step), rtol=1e-8, atol=0)


def test_tasks_together_equal_tasks_alone():
    problem, theta, lam = TanhRegression.random(TASKS, seed=12), _theta(13), 3.0
    kwargs = {"proximal": ScalarProximal(lam), "solve": partial(conjugate_gradient, max_iterations=5)}
    inner = gradient_descent(problem.support_loss, theta, lr=0.05, steps=16, proximal=ScalarProximal(lam))
    together = implicit_meta_gradient(problem.support_loss, problem.query_loss, inner.params, theta, **kwargs)
    for t in range(TASKS):
        one, anchor = problem.task(t), theta[t : t + 1]
        alone = gradient_descent(one.support_loss, anchor, lr=0.05, steps=16, proximal=ScalarProximal(lam))
        gradient = implicit_meta_gradient(one.support_loss, one.query_loss, alone.params, anchor, **kwargs).gradient
        torch.testing.assert_close(together.gradient[t], gradient[0], rtol=1e-12, atol=1e-13)


def test_negative_curvature_at_once_gives_the_first_order_direction():
    problem, theta = Quadratics.random(TASKS, 5, seed=3), _theta(5)
    concave = Quadratics(-problem.hessian - torch.eye(5, dtype=torch.float64), problem.linear, problem.target)
    found = implicit_meta_gradient(
        concave.support_loss, concave.query_loss, theta + 1, theta, proximal=ScalarProximal(0.01), solve=SOLVE
    )
    assert (found.solution.outcome == Outcome.NEGATIVE_CURVATURE).all()
    torch.testing.assert_close(found.gradient, found.first_order, rtol=0, atol=0)
    torch.testing.assert_close(found.solution.value, found.first_order / 0.01, rtol=1e-14, atol=0)
    system = concave.hessian + 0.01 * torch.eye(5, dtype=torch.float64)
    left = found.first_order - torch.einsum("tij,tj->ti", system, found.solution.value)
    true = left.norm(dim=1) / found.first_order.norm(dim=1)
    assert (true > 100).all(), "where nothing is solved the residual of the first-order direction is large"
    torch.testing.assert_close(found.solution.residual, true, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [conjugate_gradient, neumann])
def test_a_task_without_a_step_costs_one_product_and_changes_no_bit_of_the_others(solver):
    problem, theta, products = Quadratics.random(TASKS, 5, seed=3), _theta(5), []
    mixed = problem.hessian.clone()
    mixed[1] = -mixed[1] - torch.eye(5, dtype=torch.float64)

    def solved(hessian):
        def product(v):
            products.append(1)
            return torch.einsum("tij,tj->ti", hessian, v)

        return implicit_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            theta + 1,
            theta,
            proximal=ScalarProximal(0.01),
            solve=partial(solver, max_iterations=3),
            curvature=product,
        )

    healthy, plain = solved(problem.hessian), len(products)
    found = solved(mixed)
    assert len(products) == 2 * plain + 1
    assert found.solution.unsolved.tolist() == [False, True, False, False]
    assert torch.equal(found.gradient[1], found.first_order[1])
    others = [0, 2, 3]
    assert torch.equal(found.gradient[others], healthy.gradient[others])
    assert torch.equal(found.own["lam"][others], healthy.own["lam"][others])
    assert torch.equal(found.solution.residual[others], healthy.solution.residual[others])


def test_damping_is_in_the_system_only_and_turns_the_gradient_towards_first_order():
    problem, theta, lam, mu = Quadratics.random(TASKS, 6, seed=4), _theta(6), 0.5, 2.0
    phi = problem.solution(theta, lam)
    kwargs = {"proximal": ScalarProximal(lam), "solve": SOLVE}
    damped = implicit_meta_gradient(problem.support_loss, problem.query_loss, phi, theta, damping=mu, **kwargs)
    system = problem.hessian + (lam + mu) * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        damped.gradient, lam * torch.linalg.solve(system, damped.first_order), rtol=1e-11, atol=1e-12
    )
    huge = implicit_meta_gradient(problem.support_loss, problem.query_loss, phi, theta, damping=1e9, **kwargs)
    cosine = torch.nn.functional.cosine_similarity(huge.gradient, huge.first_order, eps=1e-300)
    torch.testing.assert_close(cosine, torch.ones(TASKS, dtype=torch.float64), rtol=1e-8, atol=0)


def test_misuse_is_refused():
    problem, theta = Quadratics.random(TASKS, 6, seed=4), _theta(6)
    kwargs = {"proximal": ScalarProximal(1.0), "solve": SOLVE}
    with pytest.raises(ValueError, match="damping"):
        implicit_meta_gradient(problem.support_loss, problem.query_loss, theta, theta, damping=-1.0, **kwargs)
    with pytest.raises(ValueError, match="shape"):
        implicit_meta_gradient(problem.support_loss, problem.query_loss, theta, theta[:1], **kwargs)
    for lam in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam"):
            ScalarProximal(lam)
