"""Networks of the kinds users bring, meta-trained: batched and one task at a time end at the same meta-parameters."""

import pytest
import torch
from helpers.kernels import NATIVE
from helpers.zoo import WAY, ZOO, Episodes, make

from imaml_dist import FOMAML, IMAML, MAML, GradientDescent, MetaLearner, NewtonCG, evaluate, mean_squared_error
from imaml_dist.algorithms.linear import ConjugateGradient, Dual, Minres
from imaml_dist.core.outcome import TaskOutcome
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.sinusoid import Sinusoids

INNER = GradientDescent(0.1, 3)
FAST = [(name, "vmap") for name in ZOO]
FAST += [pytest.param(name, "native", marks=NATIVE) for name in ("resnet", "dropout")]
"""Networks, and the ways to compute many tasks at once; our own kernels are for images."""


def meta_train(name, algorithm, execution, steps):
    subject, source = MetaLearner(make(name), algorithm, execution=execution), Episodes(name)
    subject.preflight(source.episodes(0, range(2)))
    # Not Adam: it enlarges the rounding of gradients that are zero, as those of a key bias in attention are.
    optimiser = torch.optim.SGD(subject.parameters(), lr=0.02, momentum=0.5)
    for step in range(steps):
        optimiser.zero_grad()
        out = subject.backward(source.episodes(step, range(3)))
        assert (out.tasks.outcome == TaskOutcome.OK).all()
        torch.nn.utils.clip_grad_norm_(subject.parameters(), 1.0)
        optimiser.step()
    return subject


@pytest.mark.parametrize("operator", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(("name", "execution"), FAST)
def test_twenty_meta_steps_agree_with_the_slow_path(name, execution, operator):
    algorithm = IMAML(0.5, INNER, ConjugateGradient(4, operator))
    begin = MetaLearner(make(name), algorithm).functional.parameters()
    fast, slow = (meta_train(name, algorithm, e, 20).functional.parameters() for e in (execution, "loop"))
    assert float((fast - begin).norm()) > 0.05, "it has moved"
    assert float((fast - slow).norm() / slow.norm()) < 1e-10


@pytest.mark.parametrize(
    "algorithm",
    [MAML(INNER), FOMAML(INNER), IMAML(0.5, NewtonCG(2, 3)), IMAML(0.5, INNER, Dual()), IMAML(0.5, INNER, Minres(4))],
    ids=["maml", "fomaml", "newton_cg", "dual", "minres"],
)
@pytest.mark.parametrize(("name", "execution"), FAST)
def test_every_kind_of_network_works_with_every_kind_of_algorithm(name, execution, algorithm):
    fast, slow = (meta_train(name, algorithm, e, 3).functional.parameters() for e in (execution, "loop"))
    assert float((fast - slow).norm() / slow.norm()) < 1e-10


@pytest.mark.parametrize("name", list(ZOO))
def test_training_writes_nothing_but_the_parameters(name):
    model = make(name)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    subject = MetaLearner(model, IMAML(0.5, INNER), execution="vmap")
    subject.backward(Episodes(name).episodes(0, range(2)))
    subject.adapt(*(Episodes(name).episodes(0, range(1)).support_x[0], torch.arange(WAY).repeat_interleave(2)))
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in buffers.items())
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    assert model.training


@pytest.mark.parametrize("name", ["transformer", "dropout"])
def test_dropout_is_the_same_for_a_task_wherever_it_is_computed(name):
    """A task's gradient does not depend on which tasks share its batch, and another key is another mask."""
    subject = MetaLearner(make(name), IMAML(0.5, INNER), execution="vmap")
    episodes = Episodes(name).episodes(3, range(4))
    together = subject.task_gradients(episodes).rows
    torch.testing.assert_close(subject.task_gradients(episodes[2:3]).rows[0], together[2], rtol=1e-9, atol=1e-12)
    episodes.key[2] += 1
    assert not torch.allclose(subject.task_gradients(episodes).rows[2], together[2], rtol=1e-3)


@pytest.mark.parametrize("name", list(ZOO))
def test_the_adapted_module_predicts_what_the_evaluation_sees(name):
    subject = MetaLearner(make(name), IMAML(0.5, INNER), execution="vmap")
    episodes = Episodes(name).episodes(0, range(1))
    adapted = subject.adapt(episodes.support_x[0], episodes.support_y[0])
    phi = subject.adapt_parameters(episodes.support_x, episodes.support_y).params
    expected = subject.functional.predict(phi, episodes.query_x)[0]
    torch.testing.assert_close(adapted(episodes.query_x[0]), expected, rtol=1e-10, atol=1e-12)


def test_sinusoid_regression_learns():
    torch.manual_seed(0)
    model = MLP((1, 1, 1), 1, [24, 24]).double()
    subject = MetaLearner(model, IMAML(0.3, GradientDescent(0.05, 8)), mean_squared_error, "vmap")
    source = Sinusoids(shots=10, queries=10, seed=0, dtype=torch.float64)
    optimiser = torch.optim.Adam(subject.parameters(), lr=5e-3)

    def loss():
        return float(subject.task_gradients(source.episodes(10_000, range(50))).tasks.query_loss.mean())

    before = loss()
    for step in range(60):
        optimiser.zero_grad()
        subject.backward(source.episodes(step, range(4)))
        optimiser.step()
    assert loss() < 0.8 * before


def test_a_transformer_meta_learns_to_tell_patterns():
    subject = MetaLearner(make("transformer"), IMAML(0.5, GradientDescent(0.3, 4)), execution="vmap")
    source = Episodes("transformer")
    before = evaluate(subject, source, tasks=30)
    optimiser = torch.optim.Adam(subject.parameters(), lr=1e-2)
    for step in range(1, 31):
        optimiser.zero_grad()
        subject.backward(source.episodes(step, range(4)))
        optimiser.step()
    after = evaluate(subject, source, tasks=30)
    assert after.mean > before.mean + 0.05
