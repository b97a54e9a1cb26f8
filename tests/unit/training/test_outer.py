"""The outer optimiser against its update rules written out, schedules, clipping, and the rule of skipping."""

import math

import pytest
import torch
from torch import nn

from imaml_dist.config.schema import OuterConfig
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.outer import clip_norm, is_usable, learning_rate, make_optimizer
from imaml_dist.training.state import MetaState

STEPS = 7


def _state(outer: OuterConfig, own_lr: float | None = None, own: bool = True) -> MetaState:
    """A linear model of 6 + 2 numbers beside one of the algorithm's own, all in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    strength = {"lam": nn.Parameter(torch.tensor([0.5], dtype=torch.float64))} if own else {}
    parameters = MetaParameters(model, strength, own_lr)
    return MetaState(parameters, make_optimizer(parameters, outer))


def _gradients(size: int) -> torch.Tensor:
    return torch.randn(STEPS, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _flat(state: MetaState) -> torch.Tensor:
    return state.parameters.layout.flatten({n: p.detach() for n, p in state.parameters.learned().items()}).clone()


def _adam(theta, gradients, rates, outer, decay, decoupled):
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        if decoupled:
            theta = theta * (1 - rate * decay)
        else:
            g = g + decay * theta
        m, v = outer.beta1 * m + (1 - outer.beta1) * g, outer.beta2 * v + (1 - outer.beta2) * g * g
        theta = theta - rate * (m / (1 - outer.beta1**t)) / ((v / (1 - outer.beta2**t)).sqrt() + outer.eps)
    return theta


def _sgd(theta, gradients, rates, outer, decay):
    velocity = torch.zeros_like(theta)
    for g, rate in zip(gradients, rates, strict=True):
        g = g + decay * theta
        velocity = outer.momentum * velocity + g
        theta = theta - rate * (g + outer.momentum * velocity if outer.nesterov else velocity)
    return theta


@pytest.mark.parametrize(
    "chosen",
    [
        {"optimizer": "adam", "weight_decay": 0.3, "eps": 1e-3},
        {"optimizer": "adamw", "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.9},
        {"optimizer": "sgd", "weight_decay": 0.3},
        {"optimizer": "sgd", "momentum": 0.8},
        {"optimizer": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_updates_are_those_of_the_rule_written_out(chosen):
    """Both groups: the algorithm's own parameter has a rate of its own on the same schedule, and no decay."""
    outer = OuterConfig(lr=0.05, schedule="cosine", warmup=2, **chosen)
    state = _state(outer, own_lr=0.2)
    start, gradients = _flat(state), _gradients(9)
    rates = [learning_rate(outer, step, STEPS) for step in range(STEPS)]
    for gradient, rate in zip(gradients, rates, strict=True):
        state.apply(gradient, rate)

    def rule(part, scale, decay):
        scaled = [scale * rate for rate in rates]
        if outer.optimizer == "sgd":
            return _sgd(start[part], gradients[:, part], scaled, outer, decay)
        return _adam(start[part], gradients[:, part], scaled, outer, decay, outer.optimizer == "adamw")

    expected = torch.cat([rule(slice(0, 8), 1.0, outer.weight_decay), rule(slice(8, 9), 4.0, 0.0)])
    torch.testing.assert_close(_flat(state), expected, rtol=1e-12, atol=1e-14)
    assert state.updates == STEPS


def test_own_parameters_follow_the_models_rate_unless_they_have_one():
    outer = OuterConfig(optimizer="sgd", lr=0.1)
    for own_lr, expected in ((None, 0.1), (0.02, 0.02)):
        state = _state(outer, own_lr)
        before = _flat(state)
        state.apply(torch.ones(9, dtype=torch.float64), 0.1)
        moved = before - _flat(state)
        torch.testing.assert_close(moved[:8], torch.full((8,), 0.1, dtype=torch.float64))
        torch.testing.assert_close(moved[8:], torch.tensor([expected], dtype=torch.float64))
    assert len(_state(outer, own=False).optimizer.param_groups) == 1


def test_a_skipped_step_leaves_parameters_optimiser_and_schedule_where_they_were():
    """Skips between updates: the same as the updates alone."""
    outer = OuterConfig(lr=0.05, schedule="linear", warmup=1)
    gradients = _gradients(9)
    whole, holed = _state(outer), _state(outer)
    for gradient in gradients[:4]:
        whole.apply(gradient, learning_rate(outer, whole.updates, STEPS))
    for gradient, skips in zip(gradients[:4], (0, 2, 1, 0), strict=True):
        for _ in range(skips):
            holed.skip()
        assert holed.skipped_in_a_row == skips
        holed.apply(gradient, learning_rate(outer, holed.updates, STEPS))
        assert holed.skipped_in_a_row == 0
    assert whole.updates == holed.updates == 4
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, holed.tensors()[name]), name


def test_schedules_are_their_formulas():
    assert {learning_rate(OuterConfig(lr=0.5), s, 10) for s in range(10)} == {0.5}
    linear = OuterConfig(lr=1.0, schedule="linear", warmup=2)
    assert [learning_rate(linear, s, 10) for s in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = OuterConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 1.0
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(cosine, 9, 10) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_clipping_shortens_only_what_is_too_long():
    gradient = torch.tensor([3.0, 4.0])
    clipped, norm = clip_norm(gradient, 1.0)
    torch.testing.assert_close(clipped, torch.tensor([0.6, 0.8]))
    assert norm == 5.0
    for limit in (None, 5.0, 7.0):
        assert clip_norm(gradient, limit)[0] is gradient


@pytest.mark.parametrize(
    ("accepted", "tasks", "norm", "usable"),
    [
        (8, 8, 1.0, True),
        (4, 8, 1.0, True),
        (3, 8, 1.0, False),
        (4, 7, 1.0, True),
        (3, 7, 1.0, False),
        (1, 1, 0.0, True),
        (0, 1, 0.0, False),
        (8, 8, math.nan, False),
        (8, 8, math.inf, False),
    ],
)
def test_a_step_needs_half_of_its_tasks_and_a_finite_gradient(accepted, tasks, norm, usable):
    assert is_usable(accepted, tasks, norm) is usable
