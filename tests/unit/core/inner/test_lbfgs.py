"""L-BFGS: its direction solves the secant equations, it goes downhill to the minimum, and a step is a gradient whatever becomes of it."""

import itertools

import pytest
import torch
from helpers.algebra import matvec_of
from helpers.problems import Quadratics, TanhRegression, dense_hessian, minimise

from imaml_dist.core.curvature import gauss_newton_operator, linearise_hessian
from imaml_dist.core.inner.lbfgs import _two_loops, lbfgs
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.diagonal import DiagonalProximal
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS = 4


def _theta(size, scale=1.0, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, dtype=torch.float64, generator=generator).expand(TASKS, -1)


def _tanh():
    return TanhRegression.random(TASKS, seed=16), _theta(13, scale=0.8)


def test_the_direction_is_that_of_the_dense_bfgs_update():
    """`B <- (I - r s y') B (I - r y s') + r s s'` from `c M`, pair by pair; a pair with r = 0 changes nothing."""
    problem, generator = Quadratics.random(TASKS, 6, seed=3), torch.Generator().manual_seed(0)
    scale, gradient = torch.rand(TASKS, dtype=torch.float64, generator=generator) + 0.5, _theta(6, seed=4)
    metric = torch.linspace(0.2, 1.0, 6, dtype=torch.float64)
    pairs, dense = [], scale[:, None, None] * torch.diag(metric)
    for k in range(4):
        s = torch.randn(TASKS, 6, dtype=torch.float64, generator=generator)
        y = (problem.hessian @ s[..., None])[..., 0]
        inverse = 1 / (s * y).sum(-1)
        inverse[0] = 0.0 if k == 2 else inverse[0]
        pairs.append((s, y, inverse))
        left = torch.eye(6, dtype=torch.float64) - inverse[:, None, None] * s[:, :, None] * y[:, None, :]
        dense = left @ dense @ left.mT + inverse[:, None, None] * s[:, :, None] * s[:, None, :]
    found = _two_loops(gradient, pairs, scale, lambda v: metric * v)
    torch.testing.assert_close(found, (dense @ gradient[..., None])[..., 0], rtol=1e-11, atol=1e-11)
    s, y, _ = pairs[-1]
    torch.testing.assert_close(
        _two_loops(y, pairs, scale, lambda v: metric * v), s, rtol=1e-11, atol=1e-11
    )  # the newest secant equation


def test_the_first_step_is_descent_with_the_rate():
    problem, theta = Quadratics.random(TASKS, 5, seed=1), _theta(5)
    gradient = (problem.hessian @ theta[..., None])[..., 0] - problem.linear
    found = lbfgs(problem.support_loss, theta, steps=1, lr=1e-3)
    torch.testing.assert_close(found.params, theta - 1e-3 * gradient, rtol=1e-13, atol=1e-13)
    assert found.steps.tolist() == [1] * TASKS


@pytest.mark.parametrize("memory", [1, 2, 10])
def test_every_step_is_that_of_the_dense_update_with_as_many_pairs(memory):
    """On a convex quadratic, where every length of 1 is accepted after the first ones: phi after 1, 2, ... steps."""
    problem, theta, lam = Quadratics.random(1, 6, seed=5), _theta(6)[:1], 0.3
    matrix = problem.hessian[0] + lam * torch.eye(6, dtype=torch.float64)
    right = problem.linear[0] + lam * theta[0]

    def value(x):
        return 0.5 * x @ matrix @ x - right @ x

    x, pairs = theta[0], []
    scale, length, lr = 0.02, 1.0, 0.02
    direction = -lr * (matrix @ x - right)
    for steps in range(1, 13):
        gradient, tried = matrix @ x - right, x + length * direction
        if value(tried) <= value(x) + 1e-4 * length * (gradient @ direction):
            s, y = tried - x, matrix @ (tried - x)
            x, pairs, scale, length = tried, [*pairs, (s, y)][-memory:], (s @ y) / (y @ y), 1.0
            dense = scale * torch.eye(6, dtype=torch.float64)
            for s, y in pairs:
                left = torch.eye(6, dtype=torch.float64) - torch.outer(s, y) / (s @ y)
                dense = left @ dense @ left.T + torch.outer(s, s) / (s @ y)
            direction = -dense @ (matrix @ x - right)
        else:
            length = 0.5 * length
        found = lbfgs(problem.support_loss, theta, steps=steps, lr=lr, memory=memory, proximal=ScalarProximal(lam))
        torch.testing.assert_close(found.params[0], x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_with_strengths_of_layers_it_is_that_of_the_problem_in_coordinates_where_they_are_one(steps):
    """`phi = (m / d)^(1/2) z` makes `1/2 (phi - theta)' diag(d) (phi - theta)` of `m/2 |z - z0|^2`."""
    problem, theta = _tanh()
    strengths = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64).repeat(5)[: theta.shape[1]]
    root = (0.3 / strengths).sqrt()
    found = lbfgs(problem.support_loss, theta, steps=steps, proximal=DiagonalProximal(strengths))
    alike = lbfgs(lambda z: problem.support_loss(root * z), theta / root, steps=steps, proximal=ScalarProximal(0.3))
    torch.testing.assert_close(found.params, root * alike.params, rtol=1e-9, atol=1e-11)


def test_negative_curvature_along_a_step_leaves_no_pair():
    """`x^4 / 4 - x^2 / 2` is concave near 0: from 0.1 the second step is a step of descent with the first rate, too."""
    theta, lr = torch.full((2, 1), 0.1, dtype=torch.float64), 0.3

    def objective(x):
        return (0.25 * x**4 - 0.5 * x**2).sum(-1)

    expected = theta
    for steps in range(1, 4):
        expected = expected - lr * (expected**3 - expected)
        torch.testing.assert_close(lbfgs(objective, theta, steps=steps, lr=lr).params, expected, rtol=1e-12, atol=0)


def test_a_rise_beyond_rounding_is_refused():
    """`1 + 1e-10 x^2`, whose first step leads from 1 to -1.1: a rise of 2e-11, which is 6,000 times what rounding may hide."""
    theta = torch.ones(1, 1, dtype=torch.float64)
    found = lbfgs(lambda x: (1 + 1e-10 * x**2).sum(-1), theta, steps=1, lr=1.05e10)
    assert torch.equal(found.params, theta)


def test_a_refused_step_costs_no_pair():
    """With one pair kept, a step that was refused and a shorter one after it use the same pair."""
    theta = torch.full((2, 1), 3.0, dtype=torch.float64)

    def objective(x):  # task 1 flattens out: Newton's step from where it is overshoots
        return torch.stack([0.5 * x[0] ** 2, (1 + x[1] ** 2).sqrt()]).sum(-1)

    found = lbfgs(objective, theta, steps=40, lr=0.1, memory=1)
    torch.testing.assert_close(found.params, torch.zeros_like(theta), rtol=0, atol=1e-8)


@pytest.mark.parametrize("memory", [1, 5, 20])
def test_the_tanh_network_is_driven_to_a_stationary_point(memory):
    problem, theta = _tanh()
    found = lbfgs(problem.support_loss, theta, steps=600, memory=memory, tolerance=1e-8, proximal=ScalarProximal(1.0))
    assert (found.stationarity <= 1e-8).all()
    assert (found.outcome == TaskOutcome.OK).all()
    assert found.steps.max() < 300
    torch.testing.assert_close(found.params, minimise(problem.support_loss, theta, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_objective_never_rises_also_where_the_hessian_is_indefinite(seed):
    problem, theta, lam = TanhRegression.random(TASKS, seed=seed), _theta(13, scale=2.0, seed=seed), 0.01
    assert float(torch.linalg.eigvalsh(dense_hessian(problem.support_loss, theta)).min()) < -lam

    def total(phi):
        return problem.support_loss(phi) + 0.5 * lam * ((phi - theta) ** 2).sum(-1)

    values = [
        total(lbfgs(problem.support_loss, theta, steps=k, lr=1.0, proximal=ScalarProximal(lam)).params)
        for k in range(0, 24, 3)
    ]
    for earlier, later in itertools.pairwise(values):
        assert (later <= earlier + 1e-14 * earlier.abs()).all()
    assert (values[-1] < 0.9 * values[0]).all()


def test_a_length_that_is_too_long_is_halved_by_the_steps_that_follow():
    """`phi^2 / 2` from 1 with a first rate of 64: Armijo's condition takes lengths below 2 (1 - 1e-4) / 64 only, the seventh."""
    theta = torch.ones(2, 1, dtype=torch.float64)

    def objective(phi):
        return 0.5 * (phi**2).sum(-1)

    for steps, expected in ((5, 1.0), (6, 1.0), (7, 0.0), (8, 0.0)):
        found = lbfgs(objective, theta, steps=steps, lr=64.0)
        assert torch.equal(found.params, torch.full_like(theta, expected)), steps


def test_a_first_rate_that_is_far_too_long_is_halved_until_it_does():
    theta = torch.ones(2, 3, dtype=torch.float64)
    found = lbfgs(lambda phi: 0.5e5 * (phi**2).sum(-1), theta, steps=20, lr=0.1)
    torch.testing.assert_close(found.params, torch.zeros_like(theta), rtol=0, atol=1e-12)


def test_a_task_that_can_go_no_lower_stays():
    """Uphill is the only way on: the gradient that is claimed has the wrong sign."""
    theta = torch.ones(1, 2, dtype=torch.float64)
    found = lbfgs(lambda phi: phi.sum(-1) - 2 * (phi - phi.detach()).sum(-1), theta, steps=100)
    torch.testing.assert_close(found.params, theta, rtol=0, atol=1e-12)
    assert found.stationarity.tolist() == [1.0]


@pytest.mark.parametrize("handed", [False, True])
def test_a_step_is_one_gradient(handed):
    problem, theta = _tanh()
    calls = []

    def objective(phi):
        calls.append(1)
        return problem.support_loss(phi)

    linearise = (lambda phi: linearise_hessian(objective, phi)) if handed else None
    found = lbfgs(objective, theta, steps=7, proximal=ScalarProximal(1.0), linearise=linearise)
    assert len(calls) == 8
    assert (found.steps == 7).all()
    assert (found.curvature is not None) == handed


@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(("lr", "tolerance"), [(0.1, 0.0), (0.1, 0.05), (30.0, 0.0)])
def test_the_curvature_it_returns_is_that_of_the_final_phi(operator, lr, tolerance):
    """Also where tasks stopped early, and where the last step was refused (a rate of 30, after a step or two)."""
    problem, theta = _tanh()

    def gauss_newton(phi):
        return gauss_newton_operator(
            lambda p: problem.predict(p, problem.support_x),
            lambda o: problem.mean_squared_error(o, problem.support_y),
            phi,
        )

    found = lbfgs(
        problem.support_loss,
        theta,
        steps=9 if tolerance else 2,
        lr=lr,
        tolerance=tolerance,
        proximal=ScalarProximal(1.0),
        linearise=lambda phi: (
            gauss_newton(phi).linearised()
            if operator == "gauss_newton"
            else linearise_hessian(problem.support_loss, phi)
        ),
    )
    if tolerance:
        assert len(set(found.steps.tolist())) > 1
    v = _theta(13, seed=3) + 1
    expected = matvec_of(dense_hessian(problem.support_loss, found.params))
    if operator == "gauss_newton":
        expected = gauss_newton(found.params)
    torch.testing.assert_close(found.curvature(v), expected(v), rtol=1e-11, atol=1e-12)


def test_tasks_together_equal_tasks_alone():
    problem, theta = _tanh()
    kwargs = {"steps": 60, "tolerance": 1e-4, "proximal": ScalarProximal(0.1)}
    together = lbfgs(problem.support_loss, theta, **kwargs)
    assert len(set(together.steps.tolist())) > 1
    for t in range(TASKS):
        alone = lbfgs(problem.task(t).support_loss, theta[t : t + 1], **kwargs)
        assert alone.steps[0] == together.steps[t]
        torch.testing.assert_close(together.params[t], alone.params[0], rtol=1e-9, atol=1e-10)


def test_a_task_that_is_not_finite_changes_no_bit_of_the_others():
    problem, theta = TanhRegression.random(TASKS, seed=2), _theta(13)
    kwargs = {"steps": 6, "proximal": ScalarProximal(0.1)}
    healthy = lbfgs(problem.support_loss, theta, **kwargs)
    x = problem.support_x.clone()
    x[1, 3] = torch.nan
    broken = lbfgs(TanhRegression(x, problem.support_y, problem.query_x, problem.query_y).support_loss, theta, **kwargs)
    others = [0, 2, 3]
    assert torch.equal(broken.params[others], healthy.params[others])
    assert torch.equal(broken.stationarity[others], healthy.stationarity[others])
    assert broken.outcome.tolist() == [0, TaskOutcome.NON_FINITE, 0, 0]
    assert torch.equal(broken.params[1], theta[1])


def test_a_step_into_what_is_not_finite_is_halved():
    """`-log phi + phi` from 3 with a first rate of 6 tries phi = -1 first; the minimum is at 1."""
    theta = torch.full((1, 1), 3.0, dtype=torch.float64)
    found = lbfgs(lambda phi: (phi - phi.log()).sum(-1), theta, steps=40, lr=6.0)
    torch.testing.assert_close(found.params, torch.ones_like(theta), rtol=0, atol=1e-8)
    assert found.outcome.tolist() == [TaskOutcome.OK]


def test_losses_that_are_linear_constant_or_flat_at_the_start_do_no_harm():
    theta = _theta(3)
    pulled = lbfgs(lambda p: p.sum(-1), theta, steps=3, proximal=ScalarProximal(2.0))
    torch.testing.assert_close(pulled.params, theta - 0.5, rtol=1e-12, atol=1e-12)
    flat = lbfgs(lambda p: (p - p.detach()).square().sum(-1), theta, steps=2, proximal=ScalarProximal(2.0))
    assert torch.equal(flat.params, theta)
    assert (flat.stationarity == 0).all()
    assert (flat.outcome == TaskOutcome.OK).all()
    stopped = lbfgs(lambda p: 0 * p.sum(-1), theta, steps=2, tolerance=0.1)
    assert stopped.steps.tolist() == [0] * TASKS


def test_float32_ends_at_its_own_precision():
    problem, theta = _tanh()
    fields = ("support_x", "support_y", "query_x", "query_y")
    single = TanhRegression(*(getattr(problem, name).float() for name in fields))
    found = lbfgs(single.support_loss, theta.float(), steps=80, proximal=ScalarProximal(1.0))
    assert (found.stationarity < 1e-4).all()
    assert (found.outcome == TaskOutcome.OK).all()


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"memory": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"tolerance": 1.0}])
def test_misuse_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lbfgs(lambda p: p.sum(-1), _theta(5), **{"steps": 1, **wrong})
