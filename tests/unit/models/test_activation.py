"""Smooth networks: the functions and their derivatives, and that all executions of a network agree on its curvature."""

import math

import pytest
import torch
from helpers.kernels import NATIVE
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from imaml_dist.algorithms.loss import cross_entropy as losses_of
from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.core.curvature import hessian_operator
from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.activation import Activation
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.mlp import MLP

DEFINITIONS = {
    "relu": (1.0, lambda x: x.clamp(min=0)),
    "silu": (1.0, lambda x: x / (1 + torch.exp(-x))),
    "gelu": (1.0, lambda x: x * 0.5 * torch.erfc(-x / math.sqrt(2))),
    "softplus": (3.0, lambda x: torch.log1p(torch.exp(3 * x)) / 3),
}
SMOOTH = ["silu", "gelu", "softplus"]
EXECUTIONS = ["loop", "vmap", pytest.param("native", marks=NATIVE)]
NETWORKS = {
    "strided": lambda **f: Conv4((1, 28, 28), 3, channels=5, **f),
    "pooled": lambda **f: Conv4((2, 17, 16), 3, channels=18, **f),
    "mlp": lambda **f: MLP((1, 4, 4), 3, hidden=(7, 5), **f),
}
IMAGES = {"strided": (1, 28, 28), "pooled": (2, 17, 16), "mlp": (1, 4, 4)}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_what_the_table_says_and_twice_differentiable(name):
    beta, definition = DEFINITIONS[name]
    f = Activation(name, beta)
    x = torch.linspace(-12, 12, 41, dtype=torch.float64).add(0.05).requires_grad_()
    torch.testing.assert_close(f(x), definition(x), rtol=1e-13, atol=1e-15)
    assert gradcheck(f, x) and gradgradcheck(f, x)
    assert list(f.parameters()) == [] and f.state_dict() == {}


def test_softplus_has_no_step_where_it_becomes_linear():
    x = torch.linspace(5, 25, 201, dtype=torch.float64).requires_grad_()
    y = Activation("softplus", 2.0)(x)
    torch.testing.assert_close(y, torch.log1p(torch.exp(2 * x)) / 2, rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.sigmoid(2 * x), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("tanh",), "activation: 'tanh' given, must be one of relu, silu, gelu, softplus"),
        (("softplus", 0.0), "softplus_beta: 0.0 given, must be positive"),
        (("softplus", math.inf), "softplus_beta: inf given, must be positive and finite"),
        (("gelu", 2.0), "softplus_beta: 2.0 given, but 'gelu' has none"),
    ],
)
def test_what_is_no_activation_is_refused(given, says):
    for make in (Activation, lambda *a: Conv4((1, 28, 28), 3, 4, None, *a), lambda *a: MLP((1, 4, 4), 3, [3], *a)):
        with pytest.raises(ValueError, match=says):
            make(*given)


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_initial_values_are_those_of_the_rectified_network(network):
    found = {}
    for name in DEFINITIONS:
        torch.manual_seed(0)
        found[name] = NETWORKS[network](activation=name, softplus_beta=DEFINITIONS[name][0])
    expected = found["relu"].state_dict()
    for name in SMOOTH:
        state = found[name].state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in state)
        found[name].load_state_dict(expected)
    x = torch.randn(6, *IMAGES[network])
    outputs = [model(x) for model in found.values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


class Problem:
    """Three tasks under parameters of their own near a network's initial ones, in float64."""

    def __init__(self, network, name, execution):
        torch.manual_seed(0)
        self.module = NETWORKS[network](activation=name, softplus_beta=DEFINITIONS[name][0]).double()
        generator = torch.Generator().manual_seed(1)
        model = FunctionalModel(self.module, native=execution == "native")
        vector = model.parameters()
        self.phi = vector + 0.1 * torch.randn(3, len(vector), generator=generator, dtype=torch.float64)
        self.v = torch.randn(self.phi.shape, generator=generator, dtype=torch.float64)
        self.x = torch.randn(3, 6, *IMAGES[network], generator=generator, dtype=torch.float64)
        self.y = torch.tensor([0, 1, 2, 0, 1, 2]).repeat(3, 1)
        self.execution, self.model = execution, model

    def rows(self, compute):
        """`compute(tasks)`, one task after the other in the loop, all in one call elsewhere."""
        if self.execution == "loop":
            return torch.cat([compute(slice(t, t + 1)) for t in range(3)])
        return compute(slice(None))

    def problem(self, tasks):
        samples = Samples(self.x[tasks], self.y[tasks])
        return TaskProblem(self.model, losses_of, self.phi[tasks], samples, samples)

    def gradient(self, phi):
        def of(tasks):
            point = phi[tasks].detach().requires_grad_()
            return torch.autograd.grad(self.problem(tasks).support_loss(point).sum(), point)[0]

        return self.rows(of)

    def hessian(self, v):
        return self.rows(lambda tasks: hessian_operator(self.problem(tasks).support_loss, self.phi[tasks])(v[tasks]))

    def gauss_newton(self, v):
        return self.rows(lambda tasks: self.problem(tasks).gauss_newton(self.phi[tasks])(v[tasks]))


def plain(problem):
    """Gradient, Hessian and Gauss-Newton products by torch's layers and textbook formulas, without this package's operators."""
    layout = ParameterLayout.of(dict(problem.module.named_parameters()))
    found = []
    for t in range(3):

        def outputs(phi, t=t):
            return torch.func.functional_call(problem.module, layout.unflatten(phi), (problem.x[t],))

        def loss(phi, t=t, outputs=outputs):
            return cross_entropy(outputs(phi), problem.y[t])

        phi, v = problem.phi[t], problem.v[t]
        gradient = torch.autograd.functional.jacobian(loss, phi)
        product = torch.autograd.functional.vhp(loss, phi, v)[1]
        logits = outputs(phi).detach()
        tangent = torch.autograd.functional.jvp(outputs, phi, v)[1]
        curved = torch.autograd.functional.vhp(lambda z, t=t: cross_entropy(z, problem.y[t]), logits, tangent)[1]
        found.append((gradient, product, torch.autograd.functional.vjp(outputs, phi, curved)[1]))
    return [torch.stack(parts).detach() for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_and_products_with_the_curvature_are_the_same_in_every_execution(network, name, execution):
    problem = Problem(network, name, execution)
    found = problem.gradient(problem.phi), problem.hessian(problem.v), problem.gauss_newton(problem.v)
    for ours, expected in zip(found, plain(problem), strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-11


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", SMOOTH)
def test_a_product_with_the_hessian_is_the_central_difference_of_the_gradient(name, execution):
    problem = Problem("strided", name, execution)
    v, h = problem.v / problem.v.norm(dim=1, keepdim=True), 1e-3
    one, two = (
        (problem.gradient(problem.phi + step * v) - problem.gradient(problem.phi - step * v)) / (2 * step)
        for step in (h, 2 * h)
    )
    expected = (4 * one - two) / 3  # of fourth order, where there is no kink
    ours = problem.hessian(v)
    assert float((ours - expected).norm() / expected.norm()) < 1e-6
