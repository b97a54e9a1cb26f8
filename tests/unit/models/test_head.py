"""Models cut before their head: where it may be done it changes no result, and everywhere else it is not done."""

import copy

import pytest
import torch
from helpers.blobs import WAY, Blobs
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist import ANIL, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.head import find_head
from imaml_dist.models.mlp import MLP


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names_of(functional, prefix):
    return tuple(name for name in functional.layout.names if name.startswith(prefix))


class Body(nn.Module):
    """Features of the 4 numbers of a sample, and a head; `forward` is what the tests are about."""

    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3) if head is None else head
        self.double()

    def forward(self, x):
        return self.head(self.body(x.flatten(1)))


class Scaled(Body):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(Body):
    def __init__(self):
        super().__init__(nn.Linear(5, 5))

    def forward(self, x):
        return self.head(super().forward(x))


class Looking(Body):
    """Its features read the head's weight, which no list of parameters tells."""

    def forward(self, x):
        return self.head(self.body(x.flatten(1)) + self.head.weight.sum())


class Tied(Body):
    def __init__(self):
        super().__init__(nn.Linear(5, 5))
        self.between = nn.Linear(5, 5)
        self.between.weight = self.head.weight
        self.double()

    def forward(self, x):
        return self.head(self.between(self.body(x.flatten(1))))


class Named(Body):
    def forward(self, x):
        return self.head(input=self.body(x.flatten(1)))


class InPlace(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2.0))


def hooked():
    """A linear layer that is more than its type says."""
    layer = nn.Linear(5, 3)
    layer.register_forward_hook(lambda module, args, output: output.sinh())
    return layer


def replaced():
    """Another one."""
    layer = nn.Linear(5, 3)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias).sinh()
    return layer


def frozen(name):
    """A linear layer one of whose parameters stays as it is."""
    layer = nn.Linear(5, 3)
    layer.get_parameter(name).requires_grad_(False)
    return layer


def cuttable():
    deep = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return [
        (Body(), "head"),
        (Body(nn.Linear(5, 3, bias=False)), "head"),
        (Body(hooked()), "head"),
        (Body(replaced()), "head"),
        (Body(frozen("weight")), "head"),
        (Body(frozen("bias")), "head"),
        (Body(deep), "head.2"),
        (Body(deep), "head"),
        (MLP((1, 2, 2), 3, [5]).double(), "layers.3"),
    ]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    ("model", "prefix"),
    cuttable(),
    ids=["linear", "no-bias", "hooked", "replaced", "bias-only", "weight-only", "last-of-deep", "deep", "mlp"],
)
def test_a_head_gives_what_the_whole_model_gives_with_its_derivatives(model, prefix, tasks):
    functional = FunctionalModel(model)
    moving, x = names_of(functional, prefix), draw(tasks, 6, 1, 2, 2)
    key = torch.arange(tasks)
    head = find_head(functional, moving, x, key)
    assert find_head(functional, moving, x, key) is head, "tried once"
    theta = (functional.parameters() + 0.1 * draw(tasks, functional.layout.size)).requires_grad_()
    named = functional.layout.unflatten(theta)
    change = 0.3 * draw(tasks, head.moving.size, seed=1)
    adapted = (head.moving.flatten({name: named[name] for name in moving}) + change).detach().requires_grad_()
    whole = functional.layout.flatten({**named, **head.moving.unflatten(adapted)})
    expected = functional.predict(whole, x, key)
    found = head.outputs(adapted, theta, head.features(theta, x, key))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.square().sum(), (theta, adapted))
    slopes = torch.autograd.grad(found.square().sum(), (theta, adapted), materialize_grads=True)
    torch.testing.assert_close(slopes, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (Scaled(), "head"),
        (Twice(), "head"),
        (Looking(), "head"),
        (Tied(), "head"),
        (Named(), "head"),
        (Body(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 3))), "head"),
        (Body(InPlace(nn.Linear(5, 4), nn.Linear(4, 3))), "head"),
        (Body(), "body.0"),
        (Body(), ""),
    ],
    ids=["more-after-it", "called-twice", "read-elsewhere", "tied", "by-name", "drops", "in-place", "first", "all"],
)
def test_where_it_would_be_wrong_there_is_no_head(model, prefix):
    functional, x = FunctionalModel(model), draw(2, 6, 4)
    moving = names_of(functional, prefix)
    assert find_head(functional, moving, x, torch.arange(2)) is None


def test_a_head_may_be_given_whole_numbers():
    tokens = torch.arange(24).remainder(7).reshape(2, 3, 4)
    functional = FunctionalModel(
        nn.Sequential(nn.Identity(), nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(8, 3)))
    )
    theta = functional.parameters().expand(2, -1)
    head = find_head(functional, functional.layout.names, tokens, None)
    assert torch.equal(head.features(theta, tokens), tokens)
    torch.testing.assert_close(head.outputs(theta, theta, tokens), functional.predict(theta, tokens))


def test_a_task_that_overflows_does_not_tell():
    functional = FunctionalModel(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double())
    moving, x = names_of(functional, "1"), draw(2, 6, 4)
    huge = x.clone()
    huge[0] = torch.inf
    assert find_head(functional, moving, huge[:1], None) is None
    assert find_head(functional, moving, huge, None) is not None, "asked again"


@pytest.mark.parametrize("execution", ["vmap", "loop", pytest.param("native", marks=NATIVE)])
def test_anil_computes_features_once_for_all_steps_of_a_convolutional_network(execution):
    torch.manual_seed(0)
    model, calls = Conv4((1, 28, 28), 3, 4).double(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    algorithm = ANIL(GradientDescent(0.3, 6))
    subject = MetaLearner(model, algorithm, execution=execution)
    x, y = draw(2, 6, 1, 28, 28), torch.arange(3).repeat(2, 2)
    episodes = EpisodeBatch(x, y, x + 0.1, y, index=torch.arange(2))
    first = subject.task_gradients(episodes)
    calls.clear()
    again = subject.task_gradients(episodes)
    assert len(calls) == 2 * (2 if execution == "loop" else 1), "once for support, once for query samples"
    assert torch.equal(again.rows, first.rows)

    class Whole(ANIL):
        def _head_loss(self, problem):
            return None

    plain = MetaLearner(model, Whole(algorithm.inner), execution=execution)
    torch.testing.assert_close(again.rows, plain.task_gradients(episodes).rows, rtol=1e-9, atol=1e-11)
    found, expected = (s.adapt_parameters(x, y).params for s in (subject, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_anil_computes_features_once_under_autocast_too(execution):
    torch.manual_seed(0)
    model, calls = Conv4((1, 28, 28), 3, 4), []
    subject = MetaLearner(model, ANIL(GradientDescent(0.1, 6)), execution=execution, autocast=torch.bfloat16)
    x, y = draw(2, 6, 1, 28, 28).float(), torch.arange(3).repeat(2, 2)
    episodes = EpisodeBatch(x, y, x + 0.1, y, index=torch.arange(2))
    subject.task_gradients(episodes)
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    found = subject.task_gradients(episodes).rows
    assert len(calls) == 2 * (2 if execution == "loop" else 1), "once for support, once for query samples"
    subject.functional.tried = lambda *_: False
    expected = subject.task_gradients(episodes).rows
    assert len(calls) > 4, "without a head the whole model is evaluated"
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "model", [Scaled(), Twice(), Looking()], ids=["more-after-it", "called-twice", "read-elsewhere"]
)
def test_autocast_makes_no_head_where_there_is_none(model):
    functional = FunctionalModel(copy.deepcopy(model).float(), autocast=torch.bfloat16)
    assert find_head(functional, names_of(functional, "head"), draw(2, 6, 4).float(), torch.arange(2)) is None


def test_anil_adapts_what_is_no_last_module_through_the_whole_model():
    torch.manual_seed(0)
    subject = MetaLearner(Scaled(), ANIL(GradientDescent(0.1, 3), ("head",)), execution="vmap")
    episodes = Blobs().episodes(0, range(2))
    assert WAY == 3
    assert subject.task_gradients(episodes).tasks.outcome.tolist() == [0, 0]
