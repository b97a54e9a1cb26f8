"""Explicit meta-gradients against loops written by hand, central differences, closed forms and the implicit gradient."""

import itertools
from functools import partial

import pytest
import torch
from helpers.problems import Quadratics, TanhRegression, minimise

from imaml_dist.core.implicit import implicit_meta_gradient
from imaml_dist.core.inner.adam import AdamRule
from imaml_dist.core.inner.gradient_descent import GradientDescentRule, gradient_descent
from imaml_dist.core.inner.momentum import MomentumRule
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.unrolled import first_order_meta_gradient, reptile_meta_gradient, unrolled_meta_gradient

TASKS, STEPS = 3, 5
PROBLEM = TanhRegression.random(TASKS, seed=8)
THETA = 0.8 * torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).expand(TASKS, -1)
HEAD = torch.arange(13) >= 8
"""The last layer of the 1-4-1 network: four weights and a bias."""


def _walk(rule, theta, gradient, steps):
    """The textbook form of each rule, independent of the library's."""
    phi, m, s = theta, torch.zeros_like(theta), torch.zeros_like(theta)
    for k in range(1, steps + 1):
        g = gradient(phi)
        if rule == "gd":
            phi = phi - 0.08 * g
        elif rule == "momentum":
            m = 0.7 * m + g
            phi = phi - 0.05 * m
        elif rule == "nesterov":
            m = 0.7 * m + g
            phi = phi - 0.05 * (g + 0.7 * m)
        else:
            m, s = 0.8 * m + 0.2 * g, 0.9 * s + 0.1 * g**2
            phi = phi - 0.06 * (m / (1 - 0.8**k)) / ((s / (1 - 0.9**k)).sqrt() + 1e-6)
    return phi


RULES = {
    "gd": GradientDescentRule(0.08),
    "momentum": MomentumRule(0.05, momentum=0.7),
    "nesterov": MomentumRule(0.05, momentum=0.7, nesterov=True),
    "adam": AdamRule(0.06, beta1=0.8, beta2=0.9, eps=1e-6),
}


def _by_hand(rule, t, theta, lam):
    """`(phi, query loss)` of task t, with the graph to theta."""
    one = PROBLEM.task(t)

    def gradient(phi):
        total = one.support_loss(phi[None]).sum() + 0.5 * lam * ((phi - theta) ** 2).sum()
        return torch.autograd.grad(total, phi, create_graph=True)[0]

    phi = _walk(rule, theta, gradient, STEPS)
    return phi, one.query_loss(phi[None])[0]


@pytest.mark.parametrize("lam", [0.0, 0.9])
@pytest.mark.parametrize("rule", RULES)
def test_maml_is_the_derivative_of_a_loop_written_by_hand_and_of_central_differences(rule, lam):
    proximal = ScalarProximal(lam) if lam else None
    inner, found = unrolled_meta_gradient(
        PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES[rule], steps=STEPS, proximal=proximal
    )
    for t in range(TASKS):
        theta = THETA[t].clone().requires_grad_(True)
        phi, query = _by_hand(rule, t, theta, lam)
        (expected,) = torch.autograd.grad(query, theta, retain_graph=True)
        torch.testing.assert_close(inner.params[t], phi.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.query_loss[t], query.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[t], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.first_order[t], torch.autograd.grad(query, phi)[0], rtol=1e-11, atol=1e-12)
        assert float((found.gradient[t] - found.first_order[t]).norm() / expected.norm()) > 0.05

    step, t = 1e-4, 1
    for i in (0, 6, 12):
        shift = step * torch.eye(13, dtype=torch.float64)[i]
        outer = lambda k: _by_hand(rule, t, (THETA[t] + k * shift).requires_grad_(True), lam)[1].detach()  # noqa: E731
        difference = (8 * (outer(1) - outer(-1)) - (outer(2) - outer(-2))) / (12 * step)
        torch.testing.assert_close(found.gradient[t, i], difference, rtol=1e-6, atol=1e-9)


def test_its_inner_solution_is_that_of_the_loop_without_a_graph():
    inner, found = unrolled_meta_gradient(
        PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES["gd"], steps=STEPS, proximal=ScalarProximal(0.9)
    )
    plain = gradient_descent(PROBLEM.support_loss, THETA, lr=0.08, steps=STEPS, proximal=ScalarProximal(0.9))
    for name in ("params", "loss", "stationarity", "steps", "outcome"):
        torch.testing.assert_close(getattr(inner, name), getattr(plain, name), rtol=1e-13, atol=1e-14)
    assert found.solution is None
    assert not any(x.requires_grad for x in (inner.params, inner.loss, inner.stationarity, found.gradient))


def test_without_a_step_it_is_the_query_gradient_at_theta():
    inner, found = unrolled_meta_gradient(PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES["adam"], steps=0)
    assert torch.equal(inner.params, THETA)
    assert (inner.stationarity == 1).all()
    torch.testing.assert_close(found.gradient, first_order_meta_gradient(PROBLEM.query_loss, THETA).gradient)
    torch.testing.assert_close(found.first_order, found.gradient, rtol=0, atol=0)


def test_the_unrolled_gradient_tends_to_the_implicit_one_geometrically():
    """Both differentiate the same proximal problem: one along the path, the other at its end."""
    lam, lr = 1.5, 0.1
    phi = minimise(PROBLEM.support_loss, THETA, lam)
    exact = implicit_meta_gradient(
        PROBLEM.support_loss,
        PROBLEM.query_loss,
        phi,
        THETA,
        proximal=ScalarProximal(lam),
        solve=partial(conjugate_gradient, max_iterations=60, rtol=1e-15),
    ).gradient
    errors = []
    for steps in (25, 50, 75, 100, 300):
        _, found = unrolled_meta_gradient(
            PROBLEM.support_loss,
            PROBLEM.query_loss,
            THETA,
            GradientDescentRule(lr),
            steps=steps,
            proximal=ScalarProximal(lam),
        )
        errors.append(float((found.gradient - exact).norm() / exact.norm()))
    rates = [later / earlier for earlier, later in itertools.pairwise(errors[:4])]
    assert max(rates) < 0.5, errors
    assert max(rates) < 4 * min(rates), (
        errors
    )  # a steady factor for every 25 steps, up to the polynomial in front of it
    assert errors[-1] < 1e-8


def _anil_by_hand(t, theta):
    body, start = theta[:8], theta[8:]
    one, head = PROBLEM.task(t), start
    for _ in range(STEPS):
        loss = one.support_loss(torch.cat([body, head])[None]).sum()
        head = head - 0.08 * torch.autograd.grad(loss, head, create_graph=True)[0]
    return one.query_loss(torch.cat([body, head])[None])[0]


@pytest.mark.parametrize("entries", [HEAD, torch.arange(8, 13), torch.tensor([12, 9, 8, 11, 10])])
def test_anil_moves_the_head_alone_and_differentiates_with_respect_to_everything(entries):
    inner, found = unrolled_meta_gradient(
        PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES["gd"], steps=STEPS, adapted_entries=entries
    )
    assert torch.equal(inner.params[:, :8], THETA[:, :8])
    assert (inner.params[:, 8:] != THETA[:, 8:]).all()
    for t in range(TASKS):
        theta = THETA[t].clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(_anil_by_hand(t, theta), theta)
        torch.testing.assert_close(found.gradient[t], expected, rtol=1e-10, atol=1e-12)
    assert (found.gradient[:, :8].norm(dim=1) > 1e-3).all()
    at = lambda phi: torch.func.grad(lambda p: PROBLEM.support_loss(p).sum())(phi)[:, 8:]  # noqa: E731
    ratio = at(inner.params).norm(dim=1) / at(THETA).norm(dim=1)
    torch.testing.assert_close(inner.stationarity, ratio, rtol=1e-11, atol=0)


def test_anil_with_a_loss_of_the_head_does_not_go_back_through_the_body_in_the_inner_loop():
    backward = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            backward.append(1)
            return gradient

    features = []

    def head_loss(theta):
        w1, b1 = Watched.apply(theta)[:, :8].split(4, dim=-1)
        hidden = torch.tanh(PROBLEM.support_x @ w1[:, None] + b1[:, None])
        features.append(1)

        def loss(head):
            outputs = hidden @ head[:, :4, None] + head[:, None, 4:]
            return PROBLEM.mean_squared_error(outputs, PROBLEM.support_y)

        return loss

    kwargs = {"steps": STEPS, "adapted_entries": HEAD, "proximal": ScalarProximal(0.3)}
    arguments = (PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES["momentum"])
    inner, found = unrolled_meta_gradient(*arguments, **kwargs, adapted_loss=head_loss)
    assert (len(backward), len(features)) == (1, 1), "once, for the meta-gradient"
    plain_inner, plain = unrolled_meta_gradient(*arguments, **kwargs)
    torch.testing.assert_close(found.gradient, plain.gradient, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(inner.params, plain_inner.params, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inner.stationarity, plain_inner.stationarity, rtol=1e-10, atol=0)


def test_meta_sgd_learns_its_rates():
    """One step on a quadratic: `d L_query / d alpha = -grad L(theta) o v`; more steps: autograd through a loop by hand."""
    problem = Quadratics.random(TASKS, 6, seed=3)
    theta = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).expand(TASKS, -1)
    rates = torch.linspace(-0.02, 0.15, 6, dtype=torch.float64)
    alpha = rates.repeat(TASKS, 1).requires_grad_(True)
    rule = GradientDescentRule(alpha)
    losses = (problem.support_loss, problem.query_loss)
    inner, found = unrolled_meta_gradient(*losses, theta, rule, steps=1, own={"rate": alpha})
    gradient = torch.einsum("tij,tj->ti", problem.hessian, theta) - problem.linear
    phi = theta - rates * gradient
    v = phi - problem.target
    torch.testing.assert_close(inner.params, phi, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.own["rate"], -gradient * v, rtol=1e-12, atol=1e-12)
    through = v - torch.einsum("tij,tj->ti", problem.hessian, rates * v)
    torch.testing.assert_close(found.gradient, through, rtol=1e-12, atol=1e-12)

    _, found = unrolled_meta_gradient(*losses, theta, rule, steps=4, own={"rate": alpha})
    for t in range(TASKS):
        a, x = rates.clone().requires_grad_(True), theta[t].clone().requires_grad_(True)
        phi = x
        for _ in range(4):
            phi = phi - a * (problem.hessian[t] @ phi - problem.linear[t])
        expected = torch.autograd.grad(0.5 * ((phi - problem.target[t]) ** 2).sum(), (x, a))
        torch.testing.assert_close(found.gradient[t], expected[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.own["rate"][t], expected[1], rtol=1e-11, atol=1e-12)
    assert alpha.grad is None


def test_first_order_maml_and_reptile_are_their_definitions():
    phi = gradient_descent(PROBLEM.support_loss, THETA, lr=0.08, steps=STEPS).params
    first, reptile = (
        first_order_meta_gradient(PROBLEM.query_loss, phi),
        reptile_meta_gradient(PROBLEM.query_loss, phi, THETA),
    )
    for t in range(TASKS):
        at = phi[t].clone().requires_grad_(True)
        query = PROBLEM.task(t).query_loss(at[None])[0]
        (v,) = torch.autograd.grad(query, at)
        torch.testing.assert_close(first.gradient[t], v, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reptile.first_order[t], v, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reptile.query_loss[t], query.detach(), rtol=1e-12, atol=0)
        walked, path = THETA[t], torch.zeros(13, dtype=torch.float64)  # the sum of lr times all gradients on the way
        for _ in range(STEPS):
            at = walked.clone().requires_grad_(True)
            (g,) = torch.autograd.grad(PROBLEM.task(t).support_loss(at[None]).sum(), at)
            walked, path = walked - 0.08 * g, path + 0.08 * g
        torch.testing.assert_close(reptile.gradient[t], path, rtol=1e-11, atol=1e-13)
    assert reptile.solution is None
    assert first.solution is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("entries", [None, HEAD])
def test_a_task_that_is_not_finite_changes_no_bit_of_the_others(rule, entries):
    x = PROBLEM.support_x.clone()
    x[1, 2] = torch.nan
    sick = TanhRegression(x, PROBLEM.support_y, PROBLEM.query_x, PROBLEM.query_y)
    results = [
        unrolled_meta_gradient(p.support_loss, p.query_loss, THETA, RULES[rule], steps=STEPS, adapted_entries=entries)
        for p in (PROBLEM, sick)
    ]
    (inner, healthy), (inner_sick, broken) = results
    others = [0, 2]
    assert torch.equal(broken.gradient[others], healthy.gradient[others])
    assert torch.equal(broken.first_order[others], healthy.first_order[others])
    assert torch.equal(inner_sick.params[others], inner.params[others])
    assert inner_sick.outcome.tolist() == [TaskOutcome.OK, TaskOutcome.NON_FINITE, TaskOutcome.OK]


def test_adam_with_gradients_that_are_exactly_zero_has_a_finite_meta_gradient():
    """Entries 4-6 never enter the support loss: their gradient is 0 at every step, and phi = theta there."""
    problem = Quadratics.random(TASKS, 7, seed=3)
    theta = torch.ones(TASKS, 7, dtype=torch.float64)

    def support(phi):
        return problem.support_loss(torch.cat([phi[:, :4], torch.zeros_like(phi[:, 4:])], dim=1))

    _, found = unrolled_meta_gradient(support, problem.query_loss, theta, AdamRule(0.1), steps=4)
    assert found.gradient.isfinite().all()
    torch.testing.assert_close(found.gradient[:, 4:], (theta - problem.target)[:, 4:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": -1}, "steps"),
        ({"own": {"rate": torch.ones(TASKS, 13)}}, "rate"),
        ({"own": {"rate": torch.ones(13, requires_grad=True)}}, "rate"),
        ({"own": {"rate": 2 * torch.ones(TASKS, 13, requires_grad=True)}}, "rate"),
        ({"adapted_entries": torch.ones(12, dtype=torch.bool)}, "adapted_entries"),
        ({"adapted_entries": torch.tensor([1, 1])}, "adapted_entries"),
        ({"adapted_entries": torch.tensor([13])}, "adapted_entries"),
        ({"adapted_entries": torch.tensor([-1])}, "adapted_entries"),
        ({"adapted_entries": torch.tensor([0.5])}, "adapted_entries"),
        ({"adapted_loss": lambda theta: lambda head: head.sum(-1)}, "adapted_entries"),
    ],
)
def test_misuse_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        unrolled_meta_gradient(PROBLEM.support_loss, PROBLEM.query_loss, THETA, RULES["gd"], **{"steps": 1, **wrong})
    with pytest.raises(ValueError, match="shape"):
        reptile_meta_gradient(PROBLEM.query_loss, THETA, THETA[:1])
