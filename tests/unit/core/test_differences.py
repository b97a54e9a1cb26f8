"""Central differences through the inner solve against closed forms, and what they say where there is no derivative."""

from types import SimpleNamespace

import pytest
import torch
from helpers.problems import Quadratics, TanhRegression, dense_hessian, minimise

from imaml_dist.core.differences import central_differences, nearby_minimiser
from imaml_dist.core.proximal.diagonal import DiagonalProximal
from imaml_dist.core.proximal.scalar import ScalarProximal

LAM = 0.5


def anywhere(support_loss, query_loss):
    """A task in which all parameters adapt, whose losses are the same wherever theta is."""
    return lambda theta: SimpleNamespace(anchor=theta, support_loss=support_loss, query_loss=query_loss)


def _draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_on_a_quadratic_task_they_are_the_closed_form():
    problem, theta, directions = Quadratics.random(1, 9, seed=1), _draw(1, 9, seed=2), _draw(3, 9, seed=3)
    found = central_differences(
        anywhere(problem.support_loss, problem.query_loss),
        theta[0],
        problem.solution(theta, LAM)[0],
        directions,
        1e-3,
        proximal=ScalarProximal(LAM),
    )
    truth = directions @ problem.meta_gradient(theta, LAM)[0]
    assert torch.allclose(found.values, truth, rtol=1e-8)
    assert torch.allclose(found.wide, truth, rtol=1e-8)  # F is quadratic, so that differences of any size are exact


@pytest.mark.parametrize("at_once", [1, 5, 99])
def test_on_a_network_with_an_indefinite_hessian_they_are_the_implicit_gradient(at_once):
    problem, theta, directions = TanhRegression.random(1, seed=1), _draw(1, 13, seed=2), _draw(4, 13, seed=3)
    best = minimise(problem.support_loss, theta, LAM)
    system = dense_hessian(problem.support_loss, best)[0] + LAM * torch.eye(13, dtype=torch.float64)
    assert torch.linalg.eigvalsh(system)[0] > 0
    at = best.clone().requires_grad_(True)
    (v,) = torch.autograd.grad(problem.query_loss(at).sum(), at)
    truth = LAM * directions @ torch.linalg.solve(system, v[0])
    arguments = (anywhere(problem.support_loss, problem.query_loss), theta[0], best[0], directions)
    errors = []
    for step in (4e-2, 1e-4):
        found = central_differences(*arguments, step, proximal=ScalarProximal(LAM), at_once=at_once)
        errors.append([float((q - truth).norm() / truth.norm()) for q in (found.wide, found.values)])
    assert errors[0][0] == pytest.approx(4 * errors[0][1], rel=0.1), (
        "the error of central differences is of second order"
    )
    assert max(errors[1]) < 1e-7


def test_the_minimiser_is_found_from_afar_for_every_task_and_any_lambda():
    problem, theta = TanhRegression.random(3, seed=1), _draw(3, 13, seed=2)
    goal = torch.full((3,), 1e-10, dtype=torch.float64)
    proximal = DiagonalProximal(torch.linspace(0.4, 2, 13, dtype=torch.float64))
    phi, left = nearby_minimiser(
        problem.support_loss, theta, theta + _draw(3, 13, seed=5), goal, proximal=proximal, damping=1.0
    )
    at = phi.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((problem.support_loss(at) + proximal.value(at - theta)).sum(), at)
    assert torch.allclose(gradient.norm(dim=1), left)
    assert (left <= goal).all()


@pytest.mark.parametrize("bent", [0.0, 1.0])
def test_a_smooth_convex_problem_of_condition_1e7_is_solved(bent):
    size = 300
    basis = torch.linalg.qr(_draw(size, size, seed=1)).Q
    scale, pull = torch.logspace(0, 3.5, size, dtype=torch.float64), _draw(size, seed=2)

    def loss(phi):
        z = phi @ basis
        s = scale * z
        return (0.5 * s**2 - pull * z + bent * torch.nn.functional.softplus(s)).sum(-1)

    zero = torch.zeros(1, size, dtype=torch.float64)
    goal = 1e-8 * (pull - bent * scale / 2).norm()[None]
    _, left = nearby_minimiser(loss, zero, zero, goal, proximal=ScalarProximal(1.0), damping=1.0)
    assert (left <= goal).all()


def test_the_bias_of_a_truncated_inner_solve_shows_where_two_steps_agree():
    """Lambda from 1e-3 to 1e3: a small residual of the whole hides a large one along what Lambda hardly holds."""
    size = 20
    strength = torch.logspace(-3, 3, size, dtype=torch.float64)
    basis = torch.linalg.qr(_draw(size, size, seed=3)).Q
    hessian = basis @ torch.diag(torch.logspace(-3, 1, size, dtype=torch.float64)) @ basis.mT
    pull, target, theta = (_draw(size, seed=seed) for seed in (4, 6, 8))
    best, directions = (
        torch.linalg.solve(hessian + torch.diag(strength), pull + strength * theta),
        _draw(4, size, seed=9),
    )
    found = central_differences(
        anywhere(
            lambda p: 0.5 * torch.einsum("ti,ij,tj->t", p, hessian, p) - p @ pull,
            lambda p: 0.5 * ((p - target) ** 2).sum(-1),
        ),
        theta,
        best,
        directions,
        1e-4,
        proximal=DiagonalProximal(strength),
    )
    truth = directions @ (strength * torch.linalg.solve(hessian + torch.diag(strength), best - target))
    bias, seen, left = (float((a - b).norm() / truth.norm()) for a, b in (
        (found.rough, truth), (found.rough, found.values), (found.values, truth)
    ))  # fmt: skip
    assert bias > 1e-6 and seen == pytest.approx(bias, rel=0.1)
    assert left < 1e-3 * seen


def test_where_the_minimiser_is_a_kink_it_is_said():
    def kinked(phi):
        return 5 * phi.abs().sum(-1)

    one = torch.ones(1, 4, dtype=torch.float64)
    _, left = nearby_minimiser(kinked, one, one, 1e-8 * one[:, 0], proximal=ScalarProximal(LAM), damping=1.0)
    assert float(left) > 1
    found = central_differences(
        anywhere(kinked, kinked),
        one[0],
        torch.zeros(4, dtype=torch.float64),
        _draw(2, 4, seed=1),
        1e-3,
        proximal=ScalarProximal(LAM),
    )
    assert found.values.isnan().all() and found.wide.isnan().all()


def test_a_loss_that_is_not_finite_is_no_derivative():
    def broken(phi):
        return (phi * torch.nan).sum(-1)

    one = torch.ones(1, 4, dtype=torch.float64)
    _, left = nearby_minimiser(broken, one, one, 1e-8 * one[:, 0], proximal=ScalarProximal(LAM), damping=1.0)
    assert left.isnan().all()
    found = central_differences(anywhere(broken, broken), one[0], one[0], one, 1e-3, proximal=ScalarProximal(LAM))
    assert found.values.isnan().all()


@pytest.mark.parametrize(("step", "at_once"), [(0.0, 1), (float("nan"), 1), (1.0, 0)])
def test_what_cannot_be_done_is_refused(step, at_once):
    one = torch.ones(3)
    with pytest.raises(ValueError, match="need step > 0 and at_once >= 1"):
        central_differences(
            anywhere(lambda p: p.sum(-1), lambda p: p.sum(-1)),
            one,
            one,
            one[None],
            step,
            proximal=ScalarProximal(1),
            at_once=at_once,
        )
