"""Modules as functions of a flat vector, and the refusal of modules that hide state."""

import warnings

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist import IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.errors import ModelError
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.mlp import MLP
from imaml_dist.models.preflight import preflight


class Odd(nn.Module):
    """A user's module: a scalar parameter, a frozen one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.register_buffer("shift", torch.full((3,), 0.5, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.linear(x) * self.frozen + self.shift


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Odd(), (4,)),
        (MLP((1, 6, 6), 5, [8]).double(), (1, 6, 6)),
        (Conv4((1, 28, 28), 5, channels=8).double(), (1, 28, 28)),
    ],
)
@pytest.mark.parametrize("tasks", [1, 3])
def test_each_task_gets_the_output_of_the_module_with_its_own_parameters(module, shape, tasks):
    generator = torch.Generator().manual_seed(1)
    functional = FunctionalModel(module)
    params = functional.parameters() + 0.1 * torch.randn(tasks, functional.layout.size, generator=generator).double()
    x = torch.randn(tasks, 7, *shape, generator=generator).double()
    outputs = functional.predict(params, x)
    before = functional.parameters()
    for t in range(tasks):
        functional.load(params[t])
        torch.testing.assert_close(outputs[t], module(x[t]), rtol=1e-10, atol=1e-10)
    functional.load(before)


class Shared(nn.Module):
    """One layer under two names, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, dtype=torch.float64)
        self.again = self.a
        self.tied = nn.Linear(4, 4, dtype=torch.float64)
        self.tied.weight = self.a.weight

    def forward(self, x):
        return self.tied(torch.tanh(self.again(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("tasks", [1, 3])
def test_shared_weights_are_shared_in_every_task_and_the_module_stays_untouched(tasks):
    module = Shared()
    functional = FunctionalModel(module)
    assert functional.layout.size == 16 + 4 + 4
    before = functional.parameters()
    params = before + torch.arange(1.0, tasks + 1, dtype=torch.float64)[:, None]
    x = torch.randn(tasks, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    outputs = functional.predict(params, x)
    assert torch.equal(functional.parameters(), before)
    for t in range(tasks):
        functional.load(params[t])
        torch.testing.assert_close(outputs[t], module(x[t]), rtol=1e-12, atol=1e-12)


def test_frozen_parameters_and_buffers_are_no_meta_parameters():
    functional = FunctionalModel(Odd())
    assert functional.layout.names == ("scale", "linear.weight", "linear.bias")
    assert functional.layout.size == 1 + 12 + 3
    assert FunctionalModel(Odd()).parameters().shape == (16,)


def test_conv4_has_the_size_of_the_reference_network():
    assert FunctionalModel(Conv4((1, 28, 28), 5)).layout.size == 113_221
    assert FunctionalModel(Conv4((1, 28, 28), 20)).layout.size == 117_076
    with pytest.raises(ValueError, match=r"pooled: false takes 28x28 images, got 84x84"):
        Conv4((3, 84, 84), 5, pooled=False)


def test_conv4_for_larger_images_is_the_pooled_network_of_mini_imagenet():
    assert FunctionalModel(Conv4((3, 84, 84), 5, 32)).layout.size == 32_901
    assert Conv4((3, 84, 84), 5, 4)(torch.randn(2, 3, 84, 84)).shape == (2, 5)
    assert Conv4((1, 17, 40), 3, 4)(torch.randn(2, 1, 17, 40)).shape == (2, 3)
    assert Conv4((1, 28, 28), 5, 64, pooled=True).head.in_features == 64
    with pytest.raises(ValueError, match=r"16x16 and more, got 15x28"):
        Conv4((1, 15, 28), 5)


@pytest.mark.parametrize("execution", ["vmap", pytest.param("native", marks=NATIVE)])
def test_the_pooled_conv4_has_the_meta_gradient_of_plain_torch(execution):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 20, 20, generator=generator, dtype=torch.float64)
    episodes = EpisodeBatch(x, torch.arange(2).repeat(2, 2), x + 0.1, torch.arange(2).repeat(2, 2), torch.arange(2))
    found = {}
    for way in ("loop", execution):
        torch.manual_seed(0)
        model = Conv4((3, 20, 20), 2, 4).double()
        algorithm = IMAML(2.0, GradientDescent(0.05, 3), ConjugateGradient(max_iterations=4, operator="hessian"))
        gradient = MetaLearner(model, algorithm, execution=way).meta_gradient(episodes).gradient
        found[way] = torch.cat([value.flatten() for value in gradient.values()])
    torch.testing.assert_close(found[execution], found["loop"], rtol=1e-9, atol=1e-12)


def test_precision_is_that_of_the_type_factors_are_rounded_to():
    single, double, rounded = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps, 2.0**-7
    assert FunctionalModel(nn.Linear(2, 2)).precision == single
    assert FunctionalModel(nn.Linear(2, 2).double()).precision == double
    assert FunctionalModel(nn.Linear(2, 2), autocast=torch.bfloat16).precision == rounded
    assert FunctionalModel(nn.Linear(2, 2).double(), autocast=torch.bfloat16).precision == double, "never cast"
    before = torch.get_float32_matmul_precision()
    try:  # what torch was told after the model was built counts
        functional = FunctionalModel(nn.Linear(2, 2))
        torch.set_float32_matmul_precision("medium")
        assert functional.precision == rounded
    finally:
        torch.set_float32_matmul_precision(before)
    assert functional.precision == single


def hooked(normalise):
    """A layer whose weight is computed before each call, in torch's old way."""
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        return nn.Sequential(normalise(nn.Linear(2, 2)))


@pytest.mark.parametrize("normalise", ["weight_norm", "spectral_norm"])
def test_normalised_weights_in_torchs_new_way_can_be_meta_trained(normalise):
    torch.manual_seed(0)
    layer = getattr(nn.utils.parametrizations, normalise)(nn.Linear(4, 3))
    functional = FunctionalModel(nn.Sequential(nn.Flatten(), layer).double().eval())
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    preflight(functional, x, torch.arange(2), vectorised=True)
    expected = functional.predict(functional.parameters().expand(2, -1), x)[0]
    torch.testing.assert_close(functional.standalone(functional.parameters())(x[0]), expected)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.ReLU()), "no parameter that requires a gradient"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)),
            r"layer '1' \(SyncBatchNorm\) normalises across processes",
        ),
        (nn.Sequential(nn.Embedding(3, 2, sparse=True)), r"layer '0' \(Embedding\) has sparse gradients"),
        (nn.Sequential(nn.EmbeddingBag(3, 2, sparse=True)), r"layer '0' \(EmbeddingBag\) has sparse gradients"),
        (nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), r"layer '0' \(Embedding\) changes its weight whenever"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), r"layer '1' \(LazyLinear\) has parameters without a shape"),
        (hooked(nn.utils.weight_norm), r"layer '0' \(Linear\) .*use torch.nn.utils.parametrizations.weight_norm"),
        (hooked(nn.utils.spectral_norm), r"layer '0' \(Linear\) .*use torch.nn.utils.parametrizations.spectral_norm"),
    ],
)
def test_what_can_never_work_is_refused_by_the_name_of_its_layer(module, says):
    with pytest.raises(ModelError, match=says):
        FunctionalModel(module)
