"""Batch normalisation with a smooth activation behind it in our CPU kernels: its digits, both derivatives, and bits for good."""

import math

import pytest
import torch
from helpers.kernels import NATIVE
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from imaml_dist.kernels import native

pytestmark = NATIVE

SHARPNESS = 2.5
FUNCTIONS = {  # and the argument of the exponential function in them, whose rounding counts as often as it is large
    "silu": (F.silu, lambda y: 0 * y),
    "gelu": (lambda y: y * torch.special.erfc(-y / math.sqrt(2)) / 2, lambda y: y**2 / 2),
    "softplus": (
        lambda y: torch.logaddexp(SHARPNESS * y, torch.zeros_like(y)) / SHARPNESS,
        lambda y: SHARPNESS * y.abs(),
    ),
}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def norm(activation, *given):
    return native.batch_norm(*given, 1e-5, activation, SHARPNESS)


def torchs(activation, x, gamma, beta):
    """The same of torch's functions, task by task."""
    function, _ = FUNCTIONS[activation]
    return torch.stack([function(F.batch_norm(x[t], None, None, gamma[t], beta[t], True)) for t in range(len(x))])


def derivatives(compute, given):
    """Result, gradient, and the gradient of a function of the gradient."""
    given = [tensor.detach().requires_grad_() for tensor in given]
    y = compute(*given)
    weights = random(*y.shape, seed=5).to(y.dtype)
    first = torch.autograd.grad((y * weights).sum(), given, create_graph=True)
    second = torch.autograd.grad(sum((part * random(*part.shape, seed=6).to(y.dtype)).sum() for part in first), given)
    return [part.detach() for part in (y, *first, *second)]


@pytest.mark.parametrize("channels", [3, 18])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_it_is_torchs_for_every_task_and_twice_differentiable(activation, channels):
    given = [random(2, 3, channels, 2, 4), random(2, channels, seed=1), random(2, channels, seed=2)]
    expected = derivatives(lambda *a: torchs(activation, *a), given)
    for ours, theirs in zip(derivatives(lambda *a: norm(activation, *a), given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    given = [tensor.requires_grad_() for tensor in given]
    assert gradcheck(lambda *a: norm(activation, *a), given, fast_mode=channels > 3)
    assert gradgradcheck(lambda *a: norm(activation, *a), given, fast_mode=channels > 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_values_have_the_digits_of_their_type(activation, dtype):
    """In full registers and in the channels left over beside them, from tiny numbers to some hundred, of either sign."""
    x, gamma = random(1, 8, 19, 6, 6, dtype=dtype), torch.logspace(-3, 2, 19, dtype=dtype)[None]
    y = native.batch_norm(x, gamma, 0 * gamma, 1e-5).double()
    assert y.min() < -100 and y.max() > 100 and y.abs().min() < 1e-4
    function, argument = FUNCTIONS[activation]
    expected, found = function(y), norm(activation, x, gamma, 0 * gamma).double()
    whole = expected.abs() > 1e-30
    error = ((found - expected) / expected).abs() / torch.finfo(dtype).eps
    assert bool((error <= 6 + 2 * argument(y))[whole].all())
    assert float(found[~whole].abs().max()) < 1e-28


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_float32_keeps_its_digits_in_both_derivatives(activation):
    given = [random(2, 20, 18, 7, 9), 1 + random(2, 18, seed=1).abs(), random(2, 18, seed=2)]
    expected = derivatives(lambda *a: torchs(activation, *a), given)
    found = derivatives(lambda *a: norm(activation, *a), [tensor.float() for tensor in given])
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_task_that_threads_share_has_the_bits_of_one_thread_and_those_it_has_among_others(activation, dtype):
    given = [random(3, 40, 17, 7, 5, dtype=dtype), *(random(3, 17, dtype=dtype, seed=seed) for seed in (1, 2))]

    def results(tasks, threads):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            x, gamma, beta = (tensor[tasks].clone().requires_grad_() for tensor in given)
            y = norm(activation, x, gamma, beta)
            first = torch.autograd.grad(y, (x, gamma, beta), given[0][tasks] ** 2, create_graph=True)
            return [y, *first, *torch.autograd.grad(first, (x, gamma, beta), [tensor[tasks] for tensor in given])]
        finally:
            torch.set_num_threads(before)

    together = results(slice(None), 1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(results(slice(None), threads), together, strict=True))
        for t in range(3):
            alone = results(slice(t, t + 1), threads)
            assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_nan_stays_one_and_stays_in_its_channel(activation):
    x, one = random(1, 4, 19, 3, 3, dtype=torch.float32), torch.ones(1, 19)
    x[0, 0, 2, 0, 0] = x[0, 0, 18, 0, 0] = torch.nan
    bad = torch.zeros(19, dtype=torch.bool)
    bad[[2, 18]] = True
    for part in derivatives(lambda *a: norm(activation, *a), [x, one, one]):
        channels = part.movedim(2, 0) if part.dim() == 5 else part.movedim(1, 0)
        assert channels[bad].isnan().all() and not channels[~bad].isnan().any()


def test_a_third_derivative_and_an_unknown_activation_are_refused():
    x, gamma = random(1, 3, 2, 2, 2).requires_grad_(), random(1, 2).requires_grad_()
    (first,) = torch.autograd.grad(norm("gelu", x, gamma, gamma).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm has no activation tanh"):
        norm("tanh", x, gamma, gamma)
