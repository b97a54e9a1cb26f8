"""Newton-CG: exact on quadratics, quadratic at the end, never uphill, and its linearisation is that of the final phi."""

import itertools
from functools import partial

import pytest
import torch
from helpers.algebra import matvec_of
from helpers.problems import Quadratics, TanhRegression, dense_hessian, minimise

from imaml_dist.core.curvature import gauss_newton_operator
from imaml_dist.core.implicit import implicit_meta_gradient
from imaml_dist.core.inner.newton_cg import newton_cg
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS = 4


def _theta(size, scale=1.0, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, dtype=torch.float64, generator=generator).expand(TASKS, -1)


def _convex(phi):
    """Strictly convex and not quadratic, with the minimum at (0, 1, 2, 3, 4): sum of cosh, and a coupling."""
    shifted = phi - torch.arange(5, dtype=phi.dtype)
    return torch.cosh(shifted).sum(-1) + 0.5 * shifted.sum(-1) ** 2


def test_a_quadratic_is_solved_in_one_step():
    problem, theta, lam = Quadratics.random(TASKS, 10, seed=1), _theta(10), 0.7
    found = newton_cg(problem.support_loss, theta, steps=1, cg_iterations=14, proximal=ScalarProximal(lam), damping=0.0)
    torch.testing.assert_close(found.params, problem.solution(theta, lam), rtol=1e-11, atol=1e-11)
    assert (found.steps == 1).all()


def test_convergence_is_quadratic_near_the_minimum():
    """`e_(k+1) <= c e_k^2`, also with the damping of the default, since that vanishes with the gradient."""
    theta = torch.arange(5, dtype=torch.float64) + 0.4 * _theta(5)
    errors = [
        float((newton_cg(_convex, theta, steps=k, cg_iterations=8).params - torch.arange(5)).norm()) for k in range(6)
    ]
    order = [
        torch.tensor(later).log() / torch.tensor(earlier).log()
        for earlier, later in itertools.pairwise(errors)
        if 1e-7 < earlier < 0.3
    ]
    assert len(order) >= 2
    assert min(order) > 1.7, errors
    assert errors[-1] < 1e-14


@pytest.mark.parametrize("cg_iterations", [5, 20])
@pytest.mark.parametrize("damping", [0.0, 1.0, 10.0])
def test_the_tanh_network_is_driven_to_a_stationary_point(cg_iterations, damping):
    problem, theta, lam = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), 1.0
    found = newton_cg(
        problem.support_loss,
        theta,
        steps=40,
        cg_iterations=cg_iterations,
        tolerance=1e-10,
        proximal=ScalarProximal(lam),
        damping=damping,
    )
    assert (found.stationarity <= 1e-10).all()
    assert (found.outcome == TaskOutcome.OK).all()
    at = found.params.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(problem.support_loss(at).sum(), at)
    assert float((gradient + lam * (found.params - theta)).abs().max()) < 1e-9
    expected = minimise(problem.support_loss, theta, lam)
    torch.testing.assert_close(found.params, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_the_objective_never_rises_also_where_the_hessian_is_indefinite(seed):
    problem, theta, lam = TanhRegression.random(TASKS, seed=seed), _theta(13, scale=2.0, seed=seed), 0.01
    assert float(torch.linalg.eigvalsh(dense_hessian(problem.support_loss, theta)).min()) < -lam

    def total(phi):
        return problem.support_loss(phi) + 0.5 * lam * ((phi - theta) ** 2).sum(-1)

    values = [
        total(newton_cg(problem.support_loss, theta, steps=k, cg_iterations=5, proximal=ScalarProximal(lam)).params)
        for k in range(8)
    ]
    for earlier, later in itertools.pairwise(values):
        assert (later <= earlier + 1e-14 * earlier.abs()).all()
    assert (values[-1] < 0.9 * values[0]).all()


def test_negative_curvature_at_once_gives_steepest_descent_whose_length_adapts():
    """`-1/2 phi^2 + eps phi^4`, from near its maximum: concave there, so no CG step exists; the minima are at +-1/2/sqrt(eps)."""

    def objective(phi):
        return (-0.5 * phi**2 + 0.01 * phi**4).sum(-1)

    theta = torch.full((2, 1), 0.01, dtype=torch.float64)
    first = newton_cg(objective, theta, steps=1, damping=0.0)
    torch.testing.assert_close(first.params, theta + theta - 0.04 * theta**3, rtol=1e-13, atol=0)
    found = newton_cg(objective, theta, steps=30)
    torch.testing.assert_close(found.params, torch.full_like(theta, 5.0), rtol=1e-10, atol=0)

    def steep(phi):  # the same, a million times as steep: a length of 1 leads to nowhere at first
        return 1e6 * objective(phi)

    found = newton_cg(steep, theta, steps=40)
    torch.testing.assert_close(found.params, torch.full_like(theta, 5.0), rtol=1e-8, atol=0)

    def flat(phi):  # and a million times as flat: a length that did not grow would need millions of steps
        return 1e-6 * objective(phi)

    found = newton_cg(flat, theta, steps=40, damping=0.0)
    torch.testing.assert_close(found.params, torch.full_like(theta, 5.0), rtol=1e-8, atol=0)


def test_a_line_search_that_fails_keeps_phi_and_damping_shortens_the_next_step():
    """Newton's step on sqrt(1 + phi^2) from 3 goes to -27, and no halving is allowed: only damping can mend it."""

    def objective(phi):
        return (1 + phi**2).sqrt().sum(-1)

    theta = torch.full((1, 1), 3.0, dtype=torch.float64)
    stuck = newton_cg(objective, theta, steps=1, damping=0.01, halvings=0)
    assert torch.equal(stuck.params, theta)
    assert stuck.steps.tolist() == [0]
    assert stuck.stationarity.tolist() == [1.0]
    found = newton_cg(objective, theta, steps=40, damping=0.01, halvings=0)
    assert float(found.params.abs().max()) < 1e-10
    assert found.steps < 40
    halved = newton_cg(objective, theta, steps=1, damping=0.0, halvings=8)
    torch.testing.assert_close(halved.params, theta - 30 / 8, rtol=1e-10, atol=0)


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_the_curvature_it_returns_is_that_of_the_final_phi_also_for_tasks_that_stopped_early(operator):
    problem, theta, lam = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), 1.0

    def gauss_newton(phi):
        return gauss_newton_operator(
            lambda p: problem.predict(p, problem.support_x),
            lambda o: problem.mean_squared_error(o, problem.support_y),
            phi,
        )

    found = newton_cg(
        problem.support_loss,
        theta,
        steps=30,
        tolerance=1e-2,
        proximal=ScalarProximal(lam),
        linearise=(lambda phi: gauss_newton(phi).linearised()) if operator == "gauss_newton" else None,
    )
    assert len(set(found.steps.tolist())) > 1
    v = _theta(13, seed=3) + 1
    expected = matvec_of(dense_hessian(problem.support_loss, found.params))
    if operator == "gauss_newton":
        expected = gauss_newton(found.params)
    torch.testing.assert_close(found.curvature(v), expected(v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_the_curvature_handed_on_saves_the_implicit_solve_its_forward_pass(operator):
    """Forward passes through the support loss (for Gauss-Newton: the outputs) are counted, with the hand-over and without."""
    problem, theta, forwards = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), []
    proximal = ScalarProximal(1.0)

    def predict(params):
        forwards.append(1)
        return problem.predict(params, problem.support_x)

    def support_loss(params):
        return problem.mean_squared_error(predict(params), problem.support_y)

    def gauss_newton(phi):
        return gauss_newton_operator(predict, lambda o: problem.mean_squared_error(o, problem.support_y), phi)

    def meta_gradient(phi, curvature):
        solve = partial(conjugate_gradient, max_iterations=40, rtol=1e-14)
        return implicit_meta_gradient(
            support_loss, problem.query_loss, phi, theta, proximal=proximal, solve=solve, curvature=curvature
        ).gradient

    linearise = (lambda phi: gauss_newton(phi).linearised()) if operator == "gauss_newton" else None
    inner = newton_cg(support_loss, theta, steps=4, proximal=proximal, linearise=linearise)
    spent = len(forwards)
    assert spent >= 4 + 1 + 4, "a linearisation at every point and a length a step"
    handed_on = meta_gradient(inner.params, inner.curvature)
    assert len(forwards) == spent
    afresh = meta_gradient(inner.params, gauss_newton(inner.params) if operator == "gauss_newton" else None)
    assert len(forwards) == spent + 1
    torch.testing.assert_close(handed_on, afresh, rtol=1e-11, atol=1e-13)


def test_gauss_newton_reaches_the_same_minimum():
    """Near it Gauss-Newton is linear at best, and the line search ends at about the root of the rounding."""
    problem, theta, lam = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8), 1.0

    def gauss_newton(phi):
        return gauss_newton_operator(
            lambda p: problem.predict(p, problem.support_x),
            lambda o: problem.mean_squared_error(o, problem.support_y),
            phi,
        )

    found = newton_cg(
        problem.support_loss,
        theta,
        steps=60,
        cg_iterations=13,
        tolerance=1e-6,
        proximal=ScalarProximal(lam),
        linearise=lambda phi: gauss_newton(phi).linearised(),
    )
    assert (found.stationarity <= 1e-6).all()
    assert (found.steps < 40).all()
    torch.testing.assert_close(found.params, minimise(problem.support_loss, theta, lam), rtol=0, atol=1e-5)


def test_one_linearisation_a_step_and_one_at_the_end():
    calls = []

    def objective(phi):
        calls.append(phi.requires_grad)
        return _convex(phi)

    newton_cg(objective, torch.arange(5.0, dtype=torch.float64) + 0.1 * _theta(5), steps=3)
    assert sum(calls) == 4
    assert len(calls) == 4 + 3  # a first length of 1 is always good here


def test_tasks_together_equal_tasks_alone():
    problem, theta = TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8)
    kwargs = {"steps": 30, "tolerance": 1e-6, "proximal": ScalarProximal(0.1)}
    together = newton_cg(problem.support_loss, theta, **kwargs)
    assert len(set(together.steps.tolist())) > 1
    for t in range(TASKS):
        alone = newton_cg(problem.task(t).support_loss, theta[t : t + 1], **kwargs)
        assert alone.steps[0] == together.steps[t]
        torch.testing.assert_close(together.params[t], alone.params[0], rtol=1e-9, atol=1e-10)


def test_a_task_that_is_not_finite_changes_no_bit_of_the_others():
    problem, theta = TanhRegression.random(TASKS, seed=2), _theta(13)
    healthy = newton_cg(problem.support_loss, theta, steps=6, proximal=ScalarProximal(0.1))
    x = problem.support_x.clone()
    x[1, 3] = torch.nan
    broken_problem = TanhRegression(x, problem.support_y, problem.query_x, problem.query_y)
    broken = newton_cg(broken_problem.support_loss, theta, steps=6, proximal=ScalarProximal(0.1))
    others, v = [0, 2, 3], _theta(13, seed=3)
    assert torch.equal(broken.params[others], healthy.params[others])
    assert torch.equal(broken.stationarity[others], healthy.stationarity[others])
    assert torch.equal(broken.curvature(v)[others], healthy.curvature(v)[others])
    assert broken.outcome.tolist() == [0, TaskOutcome.NON_FINITE, 0, 0]
    assert torch.equal(broken.params[1], theta[1])


def test_losses_that_are_linear_constant_or_flat_at_the_start_do_no_harm():
    theta = _theta(3)
    pulled = newton_cg(lambda p: p.sum(-1), theta, steps=2, proximal=ScalarProximal(2.0), damping=0.0)
    torch.testing.assert_close(pulled.params, theta - 0.5, rtol=1e-14, atol=1e-14)
    flat = newton_cg(lambda p: (p - p.detach()).square().sum(-1), theta, steps=2, proximal=ScalarProximal(2.0))
    assert torch.equal(flat.params, theta)
    assert (flat.stationarity == 0).all()
    assert (flat.outcome == TaskOutcome.OK).all()
    stopped = newton_cg(lambda p: 0 * p.sum(-1), theta, steps=2, tolerance=0.1)
    assert stopped.steps.tolist() == [0] * TASKS


def test_float32_ends_at_its_own_precision():
    single = TanhRegression(
        *(
            getattr(TanhRegression.random(TASKS, seed=16), n).float()
            for n in ("support_x", "support_y", "query_x", "query_y")
        )
    )
    theta = _theta(13, scale=0.8).float()
    found = newton_cg(single.support_loss, theta, steps=15, cg_iterations=10, proximal=ScalarProximal(1.0))
    assert (found.stationarity < 3e-6).all()
    assert (found.outcome == TaskOutcome.OK).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"cg_iterations": 0},
        {"halvings": -1},
        {"tolerance": 1.0},
        {"damping": -1.0},
        {"damping": float("nan")},
    ],
)
def test_misuse_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        newton_cg(_convex, _theta(5), **{"steps": 1, **wrong})
