"""Models that cannot be meta-trained are refused by the name of the layer, and say the way out."""

import copy

import pytest
import torch
from helpers.models import OnceOnly
from torch import nn
from torch.utils.checkpoint import checkpoint

from imaml_dist import FOMAML, IMAML, MetaLearner, NewtonCG, Reptile
from imaml_dist.errors import ModelError
from imaml_dist.models import preflight as preflight_module
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.tasks.episode import EpisodeBatch


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Counting(nn.Module):
    """Remembers how often it was called, and lets nobody see."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Once(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


class Branching(nn.Module):
    """Reads a number out of a tensor, which cannot be vectorised."""

    def forward(self, x):
        return x * 2 if float(x.detach().sum()) > -1e9 else x


class Recomputing(nn.Linear):
    """Computes its forward pass again in the backward pass, with whatever parameters the module has then."""

    def __init__(self):
        super().__init__(5, 5)

    def forward(self, x):
        return checkpoint(lambda v: torch.tanh(super(Recomputing, self).forward(v)), x, use_reentrant=False)


class HalfRight(torch.autograd.Function):
    """x^3 whose second derivative is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x.detach() * gradient

    generate_vmap_rule = True


class Wrong(nn.Module):
    def forward(self, x):
        return HalfRight.apply(x)


class Pair(nn.Linear):
    """Returns its features too."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x), x


class Pooling(nn.Linear):
    """One output for all samples."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class Undefined(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x).sub(1e6).log()


class Detached(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def learner(layer, execution="vmap"):
    torch.manual_seed(0)
    return MetaLearner(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer, nn.Linear(5, 3)), IMAML(0.5), execution=execution
    )


def episodes(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 4, generator=generator)
    y = torch.arange(3).repeat(2, 2)
    return EpisodeBatch(x, y, x + 0.1, y, index=torch.arange(2))


@pytest.mark.parametrize(
    ("layer", "execution", "says"),
    [
        (Noise(), "loop", r"layer '2' \(Noise\) gives different outputs for the same input"),
        (Counting(), "loop", r"layer '2' \(Counting\) changes '2\.calls' whenever it is called; call \.eval\(\)"),
        (Once(), "loop", r"layer '2' \(Once\) cannot be differentiated twice .*once_differentiable.*; replace it"),
        (Recomputing(), "loop", r"Sequential gives a wrong gradient at parameters that are not its own .*checkpoint"),
        (Wrong(), "loop", r"Sequential has wrong second derivatives \(relative difference"),
        (Branching(), "vmap", r"Sequential cannot be vectorised over tasks .*; set execution='loop'"),
    ],
    ids=["random", "state", "one-derivative", "recomputing", "wrong-derivative", "not-vectorised"],
)
def test_what_cannot_work_is_refused_at_the_first_meta_gradient(layer, execution, says):
    subject = learner(layer, execution)
    with pytest.raises(ModelError, match=says) as caught:
        subject.meta_gradient(episodes())
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=says):
        learner(layer, execution).preflight(episodes())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Pair(), "Pair returns tuple, should return one tensor"),
        (Pooling(), r"Pooling gives outputs of shape \(1, 3\) for 6 samples, should give one row for each"),
        (Undefined(), "Undefined gives outputs that are not finite for finite samples"),
        (Detached(), "the outputs of Detached do not depend on its parameters"),
    ],
    ids=["tuple", "pooled", "not-finite", "detached"],
)
def test_outputs_that_are_none_are_refused(model, says):
    with pytest.raises(ModelError, match=says):
        MetaLearner(model, IMAML(0.5)).preflight(episodes())


def test_samples_too_large_for_the_model_are_bad_tasks_and_no_fault_of_it():
    """Finite pixels whose outputs overflow: the first task that the model can compute is the one it is tried with."""
    subject, huge = learner(nn.Identity(), "loop"), episodes()
    huge.support_x[0] = 1e38
    assert subject.meta_gradient(huge).tasks.outcome.tolist()[1] == 0


@pytest.mark.parametrize("size", [3e38, 1e30])
@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_a_huge_first_task_ends_no_run(size, execution):
    """Noise around it, the squares of its outputs or their derivatives overflow; a model is tried with tasks that do not."""
    huge = episodes()
    huge.support_x[0] = size * huge.support_x[0].sign()
    for model in (learner(nn.Identity()).model, nn.Linear(4, 3)):
        subject = MetaLearner(model, IMAML(0.5), execution=execution)
        assert subject.meta_gradient(huge).tasks.outcome.tolist()[1] == 0
    with pytest.raises(ModelError, match="cannot be differentiated twice"):
        learner(Once(), execution).meta_gradient(huge)


def test_samples_that_overflow_are_told_from_a_wrong_model():
    huge = episodes()
    huge.support_x[0] = 1e30
    with pytest.raises(
        ModelError, match=r"Sequential gives outputs or gradients that are not finite .* 1\.0e\+30; scale"
    ):
        MetaLearner(nn.Sequential(nn.Linear(4, 3)), IMAML(0.5)).preflight(huge)


def test_what_cannot_be_vectorised_works_one_task_at_a_time():
    out = learner(Branching(), "loop").meta_gradient(episodes())
    assert out.tasks.outcome.tolist() == [0, 0]


class Hinge(nn.Module):
    """A linear layer beside a rectifier of the sum of its weights, whose kink is where `at` says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3)
        self.at = 0.0

    def forward(self, x):
        return self.inner(x) + 10 * (self.inner.weight.sum() - self.at).relu() * torch.ones_like(x[..., :1])


def test_a_kink_between_the_ends_of_a_difference_is_not_a_wrong_derivative():
    """At the first point that is tried, as a run that was started again may have it; the others are elsewhere."""
    model = Hinge()
    point = preflight_module._moved(FunctionalModel(copy.deepcopy(model).double()).parameters(), 0)
    model.at = float(point[:12].sum())  # the weights, before the bias
    off = preflight_module._second_derivatives_off
    double = FunctionalModel(copy.deepcopy(model).double())
    x, key = episodes().support_x[:1].double(), torch.zeros(1, dtype=torch.int64)
    assert off(double, x, key, 0) > 1e-2
    assert off(double, x, key, 1) is None
    found = MetaLearner(model, IMAML(0.5), execution="loop").meta_gradient(episodes())
    assert found.tasks.outcome.tolist() == [0, 0]


def test_it_waits_for_a_task_that_can_be_computed():
    subject, bad = learner(Noise(), "loop"), episodes()
    bad.support_x.fill_(torch.nan)
    assert subject.meta_gradient(bad).tasks.outcome.tolist() != [0, 0]
    with pytest.raises(ModelError, match="Noise"):
        subject.meta_gradient(episodes())


@pytest.mark.parametrize("algorithm", [FOMAML(), Reptile()], ids=["fomaml", "reptile"])
def test_first_order_algorithms_need_no_second_derivatives(algorithm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Once(), nn.Linear(5, 3))
    assert MetaLearner(model, algorithm, execution="loop").meta_gradient(episodes()).tasks.outcome.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Once(), r"layer '1' \(Once\) cannot be differentiated twice"),
        (Wrong(), "Sequential has wrong second derivatives"),
    ],
    ids=["one-derivative", "wrong-derivative"],
)
@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_first_order_maml_with_a_newton_inner_solver_needs_them(layer, says, operator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3))
    subject = MetaLearner(model, FOMAML(NewtonCG(2, 2, operator=operator)), execution="loop")
    with pytest.raises(ModelError, match=says):
        subject.meta_gradient(episodes())
