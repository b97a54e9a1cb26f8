"""Every algorithm against its definition, written by hand for one task at a time; one interface for all of them."""

from functools import partial

import pytest
import torch
from helpers.blobs import WAY, Blobs
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from imaml_dist import ANIL, FOMAML, IMAML, MAML, GradientDescent, MetaLearner, MetaSGD, ProximalStrength, Reptile
from imaml_dist.algorithms.inner import LBFGS, Adam, Momentum, NewtonCG
from imaml_dist.algorithms.linear import ConjugateGradient, Direct, Dual, Minres, Neumann, Nystrom
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.models.mlp import MLP

LR, STEPS, TASKS = 0.3, 4, 3
INNER = GradientDescent(LR, STEPS)


def learner(algorithm, execution="vmap"):
    torch.manual_seed(0)
    return MetaLearner(MLP((1, 1, 4), WAY, [5]).double(), algorithm, execution=execution)


def by_hand(subject, episodes, t):
    """The pieces of one task in plain torch: leaves, and the loss of named parameters on its support and query samples."""
    leaves = {n: p.detach().clone().requires_grad_(True) for n, p in subject.model.named_parameters()}

    def loss(named, x, y):
        return cross_entropy(functional_call(subject.model, named, (x[t],)), y[t])

    support = partial(loss, x=episodes.support_x, y=episodes.support_y)
    query = partial(loss, x=episodes.query_x, y=episodes.query_y)
    return leaves, support, query


def descend(named, loss, rates=None, moving=None, create_graph=True):
    for _ in range(STEPS):
        gradients = torch.autograd.grad(loss(named), list(named.values()), create_graph=create_graph)
        named = {
            n: p - (LR if rates is None else rates[n]) * g if moving is None or n in moving else p
            for (n, p), g in zip(named.items(), gradients, strict=True)
        }
    return named


def check(algorithm, expected_of):
    """`expected_of(subject, episodes, t)` returns the gradient by parameter name, of theta and of the algorithm's own."""
    subject, episodes = learner(algorithm), Blobs().episodes(0, range(TASKS))
    rows = subject.task_gradients(episodes).rows
    for t in range(TASKS):
        found = subject.layout.unflatten(rows[t])
        expected = expected_of(subject, episodes, t)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_maml_is_the_derivative_of_the_unrolled_loop():
    def expected(subject, episodes, t):
        leaves, support, query = by_hand(subject, episodes, t)
        value = query(descend(leaves, support))
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    check(MAML(INNER), expected)


def test_first_order_maml_is_the_query_gradient_at_phi():
    def expected(subject, episodes, t):
        leaves, support, query = by_hand(subject, episodes, t)
        phi = {n: p.detach().requires_grad_(True) for n, p in descend(leaves, support).items()}
        return dict(zip(leaves, torch.autograd.grad(query(phi), list(phi.values())), strict=True))

    check(FOMAML(INNER), expected)


def test_reptile_moves_towards_where_mini_batches_of_all_samples_lead():
    """4 support and 8 query samples a class: the query set is two batches of the support's size and balance."""

    def expected(subject, episodes, t):
        leaves, support, _ = by_hand(subject, episodes, t)
        batches = [support]
        for begin in (0, 1):
            x, y = episodes.query_x[t, begin::2], episodes.query_y[t, begin::2]
            assert y.bincount().tolist() == [4] * WAY
            batches.append(lambda named, x=x, y=y: cross_entropy(functional_call(subject.model, named, (x,)), y))
        named = leaves
        for step in range(STEPS):
            gradients = torch.autograd.grad(batches[step % 3](named), list(named.values()))
            named = {n: p - LR * g for (n, p), g in zip(named.items(), gradients, strict=True)}
        return {n: leaves[n].detach() - named[n].detach() for n in leaves}

    subject = learner(Reptile(INNER))
    episodes = Blobs(queries=8).episodes(0, range(TASKS))
    rows = subject.task_gradients(episodes).rows
    for t in range(TASKS):
        for name, gradient in expected(subject, episodes, t).items():
            torch.testing.assert_close(subject.layout.unflatten(rows[t])[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", [(), ("layers.3",), ("layers.3.weight",)])
def test_anil_adapts_the_head_alone_and_differentiates_with_respect_to_all(head):
    subject = learner(ANIL(INNER))
    names = subject.functional.layout.names
    moving = {n for n in names if n.startswith(head[0])} if head else set(names[-2:])
    assert 0 < len(moving) < len(names)

    def expected(subject, episodes, t):
        leaves, support, query = by_hand(subject, episodes, t)
        value = query(descend(leaves, support, moving=moving))
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    check(ANIL(INNER, head), expected)
    episodes = Blobs().episodes(0, range(2))
    adapted = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    before = subject.functional.layout.unflatten(subject.functional.parameters())
    after = subject.functional.layout.unflatten(adapted)
    for name in names:
        assert torch.equal(after[name][0], before[name]) == (name not in names[-2:])


def test_meta_sgd_learns_a_rate_for_every_parameter():
    def expected(subject, episodes, t):
        leaves, support, query = by_hand(subject, episodes, t)
        rates = {n: torch.full_like(p, LR).requires_grad_(True) for n, p in leaves.items()}
        value = query(descend(leaves, support, rates=rates))
        gradients = torch.autograd.grad(value, [*leaves.values(), *rates.values()])
        named = dict(zip(leaves, gradients[: len(leaves)], strict=True))
        return named | {"algorithm.rates": torch.cat([g.flatten() for g in gradients[len(leaves) :]])}

    check(MetaSGD(INNER), expected)
    assert learner(MetaSGD(INNER)).describe_own() == {"rates_min": LR, "rates_median": LR, "rates_max": LR}


EVERY = [
    IMAML(0.5, INNER),
    IMAML(0.5, Momentum(0.1, 5)),
    IMAML(0.5, Adam(0.05, 5, tolerance=0.3)),
    IMAML(0.5, NewtonCG(4, 6)),
    IMAML(0.5, LBFGS(0.1, 12)),
    IMAML(0.5, NewtonCG(4, 6, operator="hessian"), ConjugateGradient(8, "hessian")),
    IMAML(0.5, INNER, ConjugateGradient(8, preconditioner="regulariser", start="first_order")),
    IMAML(0.5, INNER, ConjugateGradient(8, preconditioner="nystrom", rank=3)),
    IMAML(0.5, INNER, Minres(12)),
    IMAML(0.5, INNER, Neumann(12)),
    IMAML(0.5, INNER, Nystrom(10)),
    IMAML(0.5, INNER, Dual()),
    IMAML(0.5, INNER, Direct()),
    *(IMAML(ProximalStrength(kind, 0.5, learn=True), INNER) for kind in ("scalar", "per_layer", "diagonal")),
    IMAML(ProximalStrength("low_rank", 0.5, learn=True, rank=2), INNER),
    IMAML(ProximalStrength("kronecker", 0.5, learn=True), INNER, Dual()),
    IMAML(0.5, INNER, ConjugateGradient(5, "hessian", damping=10.5, atol=1e-5), reference_inner=True, lam_offset=10.0),
    MAML(INNER),
    MAML(INNER, lam=0.5),
    MAML(Adam(0.1, 5)),
    FOMAML(INNER),
    Reptile(INNER),
    ANIL(INNER),
    MetaSGD(INNER),
]


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: f"{type(a).__name__}-{EVERY.index(a)}")
def test_batched_and_one_at_a_time_agree_for_every_algorithm(algorithm):
    episodes = Blobs().episodes(0, range(TASKS))
    together, alone = (learner(algorithm, e).task_gradients(episodes) for e in ("vmap", "loop"))
    assert (together.tasks.outcome == TaskOutcome.OK).all()
    assert together.rows.shape[1] == learner(algorithm).layout.size
    scale = float(alone.rows.abs().max())
    torch.testing.assert_close(together.rows / scale, alone.rows / scale, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: f"{type(a).__name__}-{EVERY.index(a)}")
def test_every_algorithm_learns_with_a_plain_torch_optimiser(algorithm):
    """Also its own parameters move, and stay what they must be."""
    subject, source = learner(algorithm), Blobs()
    optimiser = torch.optim.Adam(subject.parameters(), lr=1e-2)
    own = {n: p.detach().clone() for n, p in subject.own.items()}

    def accuracy():
        return float(subject.task_gradients(source.episodes(0, range(30))).tasks.query_accuracy.mean())

    before = accuracy()
    for step in range(1, 26):
        optimiser.zero_grad()
        subject.backward(source.episodes(step, range(4)))
        optimiser.step()
    assert accuracy() > before + 0.01 or before > 0.97
    for name, value in own.items():
        assert not torch.equal(subject.own[name], value), name
        assert subject.own[name].isfinite().all()
    assert all(low > 0 for name, low in subject.describe_own().items() if name == "lam_min")


def test_the_reference_preset_is_what_the_public_code_computes():
    """Plain inner steps, one step on the proximal term, and CG on ((1 + mu) I + H / (lam + 10)) x = v, written by hand."""
    lam, mu = 2.0, 1.0
    solver = ConjugateGradient(5, "hessian", damping=mu * (lam + 10.0), atol=1e-5)
    subject = learner(IMAML(lam, INNER, solver, reference_inner=True, lam_offset=10.0))
    episodes = Blobs().episodes(0, range(TASKS))
    rows = subject.task_gradients(episodes).rows
    layout = subject.functional.layout
    for t in range(TASKS):
        leaves, support, query = by_hand(subject, episodes, t)
        theta = layout.flatten({n: p.detach() for n, p in leaves.items()})
        phi = layout.flatten({n: p.detach() for n, p in descend(leaves, support).items()})
        phi = phi - LR * lam * (phi - theta)
        hessian = torch.autograd.functional.hessian(lambda row: support(layout.unflatten(row)), phi)
        point = phi.clone().requires_grad_(True)
        (v,) = torch.autograd.grad(query(layout.unflatten(point)), point)
        matrix = (1 + mu) * torch.eye(len(v), dtype=torch.float64) + hessian / (lam + 10)
        x, r = torch.zeros_like(v), v.clone()
        p, rr = r, r @ r
        for _ in range(5):
            if rr < 1e-10:
                break
            ap = matrix @ p
            x, r = x + rr / (p @ ap) * p, r - rr / (p @ ap) * ap
            p, rr = r + (r @ r) / rr * p, r @ r
        torch.testing.assert_close(rows[t], x, rtol=1e-9, atol=1e-11)
    plain = learner(FOMAML(INNER)).adapt_parameters(episodes.support_x, episodes.support_y).params
    tested = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    torch.testing.assert_close(tested, plain, rtol=0, atol=0)


def test_newton_cg_hands_its_curvature_on_and_the_gradient_is_the_same():
    solver = ConjugateGradient(40, "hessian", rtol=1e-13)
    episodes = Blobs().episodes(0, range(TASKS))
    inner = NewtonCG(12, 30, operator="hessian")

    class Fresh(IMAML):
        def _curvature(self, problem, inner):
            assert inner.curvature is not None
            return

    kept, fresh = (learner(kind(1.0, inner, solver)).task_gradients(episodes) for kind in (IMAML, Fresh))
    assert float(kept.tasks.stationarity.max()) < 1e-9
    torch.testing.assert_close(kept.rows, fresh.rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IMAML(0.0), "lam"),
        (lambda: IMAML(ProximalStrength("diagonal"), reference_inner=True), "fixed scalar"),
        (lambda: IMAML(0.5, Momentum(), lam_offset=1.0), "gradient descent"),
        (
            lambda: MAML(GradientDescent(0.1, 5, tolerance=0.1)),
            r"inner\.tolerance: 0\.1 given, but MAML takes all inner steps",
        ),
        (lambda: MAML(Momentum(0.1, 5, tolerance=0.2)), r"inner\.tolerance: 0\.2 given"),
        (lambda: ANIL(Adam(tolerance=0.1)), r"inner\.tolerance: 0\.1 given, but ANIL takes"),
        (lambda: MetaSGD(GradientDescent(tolerance=0.1)), r"inner\.tolerance: 0\.1 given, but MetaSGD takes"),
        (lambda: Reptile(GradientDescent(tolerance=0.1)), r"inner\.tolerance: .* set it to 0, or use IMAML or FOMAML"),
    ],
)
def test_misuse_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"head: 'tail' is no parameter"):
        learner(ANIL(INNER, ("tail",)))
