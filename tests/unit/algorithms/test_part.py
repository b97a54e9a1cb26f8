"""A part of the parameters adapts: the gradient of all is that of dense algebra, of differences, and of infinite strengths."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.blobs import WAY, Blobs
from helpers.kernels import NATIVE
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from imaml_dist import IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner, ProximalStrength
from imaml_dist.algorithms.inner import LBFGS, NewtonCG
from imaml_dist.algorithms.linear import Dual
from imaml_dist.core.linear.solution import Outcome
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.mlp import MLP
from imaml_dist.training.diagnosis import diagnose

TASKS, LAM = 3, 0.1
SOLVED = NewtonCG(steps=30, cg_iterations=60, operator="hessian", tolerance=1e-13)
HEAD = ("layers.3",)


def exact(operator="hessian"):
    return ConjugateGradient(200, operator, rtol=1e-13)


def learner(algorithm, execution="vmap"):
    torch.manual_seed(0)
    return MetaLearner(MLP((1, 1, 4), WAY, [5]).double(), algorithm, execution=execution)


def blobs():
    return Blobs(queries=8).episodes(0, range(TASKS))


def dense(subject, episodes, phi, t):
    """Gradient of the query loss and Hessian of the support loss of task t at phi, of all parameters, by torch alone."""
    layout = subject.functional.layout

    def loss(row, x, y):
        return cross_entropy(functional_call(subject.model, layout.unflatten(row), (x[t],)), y[t])

    at = phi[t].clone().requires_grad_(True)
    (v,) = torch.autograd.grad(loss(at, episodes.query_x, episodes.query_y), at)
    support = lambda row: loss(row, episodes.support_x, episodes.support_y)  # noqa: E731
    return v, torch.autograd.functional.hessian(support, phi[t])


@pytest.mark.parametrize("adapts", [HEAD, ("layers.1",), ("layers.3.weight",), ("layers.1.bias", "layers.3")])
def test_it_is_the_implicit_gradient_by_dense_algebra(adapts):
    """`g_w = lam (H_ww + lam I)^-1 v_w`, `g_b = v_b - H_bw g_w / lam`, also of a part that no head can be cut off with."""
    subject, episodes = learner(IMAML(2.0, SOLVED, exact(), adapts=adapts)), blobs()
    found = subject.task_gradients(episodes)
    assert (found.tasks.stationarity < 1e-10).all() and (found.tasks.cg_residual < 1e-10).all()
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    layout = subject.functional.layout
    names = [n for n, size in zip(layout.names, layout.sizes, strict=True) for _ in range(size)]
    moving = torch.tensor([any(n == a or n.startswith(a + ".") for a in adapts) for n in names])
    theta = subject.meta_parameters()
    for t in range(TASKS):
        assert torch.equal(phi[t, ~moving], theta[~moving]) and (phi[t, moving] != theta[moving]).all()
        v, h = dense(subject, episodes, phi, t)
        system = h[moving][:, moving] + 2.0 * torch.eye(int(moving.sum()), dtype=h.dtype)
        u = torch.linalg.solve(system, v[moving])
        expected = v - torch.cat([h[:, moving] @ u])
        expected[moving] = 2.0 * u
        torch.testing.assert_close(found.rows[t], expected, rtol=1e-8, atol=1e-10)
        cosine = torch.nn.functional.cosine_similarity(expected, v, dim=0)
        torch.testing.assert_close(found.tasks.cosine[t], cosine, rtol=1e-8, atol=1e-10)


def test_it_is_the_limit_of_strengths_without_end():
    """The difference to a strength s for the others falls as 1 / s."""
    episodes, part = blobs(), learner(IMAML(LAM, SOLVED, exact(), adapts=HEAD))
    found, differences = part.task_gradients(episodes).rows, []
    others = [n for n in part.functional.layout.names if not n.startswith(HEAD[0])]
    for strength in (1e3, 1e4, 1e5):
        lam = ProximalStrength("per_layer", LAM, layers=tuple((n, strength) for n in others))
        rows = learner(IMAML(lam, LBFGS(steps=150, tolerance=1e-13), exact())).task_gradients(episodes).rows
        differences.append((rows - found).norm(dim=1) / found.norm(dim=1))
    assert (differences[0] < 0.01).all()
    for before, after in itertools.pairwise(differences):
        torch.testing.assert_close(before / after, torch.full_like(after, 10.0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("adapts", [HEAD, ("layers.1",)])
def test_central_differences_through_the_inner_solve_agree(adapts):
    found = diagnose(learner(IMAML(2.0, SOLVED, exact(), adapts=adapts)), Blobs(queries=8), TASKS)
    for task in found:
        assert (task.reference, task.system) == ("compared", "positive_definite")
        assert task.error < 1e-6 and task.difference_error < 1e-6


def test_a_linear_head_is_solved_exactly_by_gauss_newton_and_the_dual():
    """Its Hessian in its own parameters is the Gauss-Newton matrix; the block between them and what is shared is the Hessian's."""
    rows = [
        learner(IMAML(LAM, SOLVED, solver, adapts=HEAD)).task_gradients(blobs()).rows
        for solver in (exact(), exact("gauss_newton"), Dual())
    ]
    for found in rows[1:]:
        torch.testing.assert_close(found, rows[0], rtol=1e-8, atol=1e-10)


class Scaled(nn.Module):
    """What its head returns is not what it returns."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAY)

    def forward(self, x):
        return 2.0 * self.head(torch.tanh(self.body(x.flatten(1))))


def test_without_a_head_that_can_be_cut_off_the_whole_model_is_evaluated():
    torch.manual_seed(0)
    scaled = Scaled().double()
    plain = nn.Sequential(nn.Flatten(), copy.deepcopy(scaled.body), nn.Tanh(), copy.deepcopy(scaled.head))
    with torch.no_grad():
        plain[3].weight.mul_(2.0), plain[3].bias.mul_(2.0)
    whole = MetaLearner(scaled, IMAML(4 * LAM, SOLVED, exact(), adapts=("head",)), execution="vmap")
    cut = MetaLearner(plain, IMAML(LAM, SOLVED, exact(), adapts=("3",)), execution="vmap")
    found, expected = (s.task_gradients(blobs()).rows for s in (whole, cut))
    entries = 5 * WAY + WAY  # of the head, which is twice as large in the other: gradients are half of these
    torch.testing.assert_close(found[:, :-entries], expected[:, :-entries], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found[:, -entries:], 2.0 * expected[:, -entries:], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("execution", ["vmap", "loop", pytest.param("native", marks=NATIVE)])
def test_features_of_a_convolutional_network_are_computed_once_for_all_steps(execution):
    torch.manual_seed(0)
    model, calls = Conv4((1, 28, 28), 3, 4, activation="silu").double(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    algorithm = IMAML(LAM, LBFGS(steps=12), ConjugateGradient(10, "hessian"), adapts=("head",))
    subject = MetaLearner(model, algorithm, execution=execution)
    x = torch.randn(2, 6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(3).repeat(2, 2)
    episodes = EpisodeBatch(x, y, x + 0.1 * x.flip(1), y, index=torch.arange(2))
    subject.task_gradients(episodes)  # what a first call tries
    subject.adapt_parameters(x, y)
    calls.clear()
    found = subject.task_gradients(episodes)
    assert len(calls) == 2 * (2 if execution == "loop" else 1), "once for support, once for query samples"
    calls.clear()
    subject.adapt_parameters(x, y)
    assert len(calls) == 1
    subject.functional.tried = lambda *_: False
    calls.clear()
    expected = subject.task_gradients(episodes)
    assert len(calls) > 12, "without a head the whole model is evaluated"
    torch.testing.assert_close(found.rows, expected.rows, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.tasks.to_rows(), expected.tasks.to_rows(), rtol=1e-7, atol=1e-9)


def test_a_task_that_falls_back_to_gauss_newton_is_that_of_gauss_newton():
    """A hidden layer, whose Hessian is indefinite in some tasks and not in others."""
    solver = ConjugateGradient(12, "hessian", on_negative_curvature="gauss_newton")
    algorithm = IMAML(0.3, GradientDescent(0.1, 2), solver, adapts=("layers.1",))
    episodes = Blobs(queries=8).episodes(0, range(12))
    mixed = learner(algorithm).task_gradients(episodes)
    redone = mixed.tasks.cg_outcome == int(Outcome.NEGATIVE_CURVATURE)
    assert redone.any() and not redone.all()
    for operator, tasks in (("hessian", ~redone), ("gauss_newton", redone)):
        alone = learner(replace(algorithm, solver=ConjugateGradient(12, operator))).task_gradients(episodes)
        torch.testing.assert_close(mixed.rows[tasks], alone.rows[tasks], rtol=1e-9, atol=1e-11)


class Unused(nn.Module):
    """A frozen body, a head, and a parameter that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(4, 5), nn.Linear(5, WAY), nn.Parameter(torch.ones(2))
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


def test_what_nothing_depends_on_has_no_gradient():
    subject = MetaLearner(Unused().double(), IMAML(LAM, adapts=("head",)), execution="vmap")
    found = subject.layout.unflatten(subject.task_gradients(blobs()).rows)
    assert not found["spare"].any() and found["head.weight"].any()


def test_a_task_whose_solve_takes_no_step_keeps_the_first_order_direction():
    subject = learner(IMAML(1e-6, GradientDescent(0.01, 1), ConjugateGradient(5, "hessian"), adapts=("layers.1",)))
    with torch.no_grad():
        for parameter in subject.parameters():
            parameter.mul_(4.0)  # far from where the Hessian is positive definite
    found = subject.task_gradients(Blobs(queries=8).episodes(0, range(40)))
    unsolved = found.tasks.cg_iterations == 0
    assert unsolved.any() and not unsolved.all()
    torch.testing.assert_close(found.tasks.cosine[unsolved], torch.ones_like(found.tasks.cosine[unsolved]))
    assert (found.tasks.cosine[~unsolved] < 0.999).all()


def test_a_learned_lambda_is_that_of_what_adapts():
    """Its gradient against central differences of the query loss at the solution, by the logarithm of lambda."""
    episodes = blobs()

    def query_loss(log_lam):
        subject = learner(IMAML(math.exp(log_lam), SOLVED, exact(), adapts=HEAD))
        return subject.task_gradients(episodes).tasks.query_loss

    for kind in ("scalar", "per_layer"):
        subject = learner(IMAML(ProximalStrength(kind, LAM, learn=True), SOLVED, exact(), adapts=HEAD))
        own = {n: g for n, g in subject.layout.unflatten(subject.task_gradients(episodes).rows).items() if "lam" in n}
        (gradient,) = own.values()
        (raw,) = (p for n, p in subject.named_parameters() if "lam" in n)
        at, h = math.log(LAM), 1e-4
        slope = (query_loss(at + h) - query_loss(at - h)) / (2 * h)
        with torch.no_grad():
            before = subject.describe_own()["lam_median"]
            raw += 1e-6
            scale = (subject.describe_own()["lam_median"] / before - 1) / 1e-6  # d log lam / d raw
        torch.testing.assert_close(gradient.reshape(TASKS, -1).sum(1), slope * scale, rtol=1e-4, atol=1e-7)


def test_a_name_of_no_parameter_is_refused():
    with pytest.raises(
        ValueError, match=r"adapts: 'tail' is no parameter and begins none; there are layers\.1\.weight, "
    ):
        learner(IMAML(LAM, adapts=("tail",)))
