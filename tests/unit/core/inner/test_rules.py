"""Update rules against torch's own optimisers, run for real on every task alone."""

import pytest
import torch
from helpers.problems import TanhRegression

from imaml_dist.core.inner.adam import AdamRule
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.gradient_descent import GradientDescentRule
from imaml_dist.core.inner.momentum import MomentumRule
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS, STEPS = 3, 12
THETA = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).expand(TASKS, -1)
PROBLEM = TanhRegression.random(TASKS, seed=5)

RULES = {
    "sgd": (GradientDescentRule(0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": (MomentumRule(0.03, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8)),
    "nesterov": (
        MomentumRule(0.03, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8, nesterov=True),
    ),
    "adam": (AdamRule(0.07), lambda p: torch.optim.Adam(p, lr=0.07)),
    "adam's arguments": (
        AdamRule(0.07, beta1=0.7, beta2=0.9, eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.07, betas=(0.7, 0.9), eps=1e-3),
    ),
}


@pytest.mark.parametrize("lam", [None, 0.7])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_the_optimiser_of_torch_on_every_task(name, lam):
    rule, optimiser = RULES[name]
    proximal = None if lam is None else ScalarProximal(lam)
    found = descend(PROBLEM.support_loss, THETA, rule, steps=STEPS, proximal=proximal)
    for t in range(TASKS):
        parameter = torch.nn.Parameter(THETA[t].clone())
        steps = optimiser([parameter])
        for _ in range(STEPS):
            steps.zero_grad()
            loss = PROBLEM.task(t).support_loss(parameter[None]).sum()
            (loss + 0.5 * (lam or 0.0) * ((parameter - THETA[t]) ** 2).sum()).backward()
            steps.step()
        torch.testing.assert_close(found.params[t], parameter.detach(), rtol=1e-12, atol=1e-12)
    assert (found.params - THETA).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("make", [GradientDescentRule, MomentumRule, AdamRule])
def test_a_rate_may_be_a_tensor_with_an_entry_for_every_parameter_or_task(make):
    rates = torch.linspace(0.01, 0.08, 13, dtype=torch.float64)
    mixed = descend(PROBLEM.support_loss, THETA, make(rates), steps=1)
    for i in (0, 5, 12):
        uniform = descend(PROBLEM.support_loss, THETA, make(float(rates[i])), steps=1)
        torch.testing.assert_close(mixed.params[:, i], uniform.params[:, i], rtol=1e-14, atol=1e-14)
    rows = torch.tensor([[0.01], [0.02], [0.03]], dtype=torch.float64)
    by_task = descend(PROBLEM.support_loss, THETA, make(rows), steps=4)
    uniform = descend(PROBLEM.support_loss, THETA, make(0.02), steps=4)
    torch.testing.assert_close(by_task.params[1], uniform.params[1], rtol=1e-13, atol=1e-13)


def test_the_derivative_of_adam_at_a_zero_gradient_is_the_one_of_its_formula():
    """The first update is `lr g / (|g| + eps)`: its derivative `lr eps / (|g| + eps)^2` tends to lr / eps at 0."""
    rule = AdamRule(0.5, eps=0.01)
    gradient = torch.tensor([[0.0, 1e-12, 0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    update, _ = rule.update(gradient, rule.start(gradient), 0)
    (derivative,) = torch.autograd.grad(update.sum(), gradient)
    expected = 0.5 * 0.01 / (gradient.detach().abs() + 0.01) ** 2
    torch.testing.assert_close(derivative, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: GradientDescentRule(0.0), "lr"),
        (lambda: GradientDescentRule(float("inf")), "lr"),
        (lambda: MomentumRule(-1.0), "lr"),
        (lambda: MomentumRule(0.1, momentum=1.0), "momentum"),
        (lambda: AdamRule(float("nan")), "lr"),
        (lambda: AdamRule(0.1, beta1=1.0), "beta1"),
        (lambda: AdamRule(0.1, beta2=-0.1), "beta2"),
        (lambda: AdamRule(0.1, eps=0.0), "eps"),
    ],
)
def test_misuse_is_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()
