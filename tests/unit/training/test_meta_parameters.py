"""Parameters of the model and of the algorithm as one: their order, their gradients, and what is saved of them."""

import pytest
import torch
from torch import nn

from imaml_dist import FOMAML, MetaLearner
from imaml_dist.config.schema import OuterConfig
from imaml_dist.errors import CheckpointError
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import MetaParameters, meta_parameters
from imaml_dist.training.outer import make_optimizer
from imaml_dist.training.state import MetaState, sha256_of


def _parameters(seed=0, **own):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    own = own or {"lam": torch.rand(1), "rates": torch.rand(4)}
    return MetaParameters(model, {name: nn.Parameter(value) for name, value in own.items()})


def test_the_flat_gradient_reaches_the_model_first_and_then_the_algorithm():
    parameters = _parameters()
    layout = parameters.layout
    assert layout.names == ("0.weight", "0.bias", "1.weight", "algorithm.lam", "algorithm.rates")
    parameters.set_gradient(torch.arange(float(layout.size)))
    assert parameters.model[0].weight.grad.flatten().tolist() == list(range(6))
    assert parameters.own["lam"].grad.tolist() == [12.0]
    assert parameters.own["rates"].grad.tolist() == [13.0, 14.0, 15.0, 16.0]
    assert parameters.model[1].bias.grad is None


def test_a_learner_without_parameters_of_its_own_has_the_layout_of_its_model():
    learner = MetaLearner(nn.Linear(2, 3), FOMAML())
    parameters = meta_parameters(learner)
    assert parameters.layout == learner.functional.layout
    assert parameters.describe() == {}
    assert parameters.own_lr is None


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_what_the_algorithm_learns_is_saved_restored_and_stepped_on_alike(tmp_path, optimizer):
    outer = OuterConfig(lr=0.1, **optimizer)

    def state(seed):
        parameters = _parameters(seed)
        return MetaState(parameters, make_optimizer(parameters, outer))

    def step(subject, seed):
        gradient = torch.randn(subject.parameters.layout.size, generator=torch.Generator().manual_seed(seed))
        subject.apply(gradient, 0.1)
        subject.ledger.commit(subject.step, [0])

    saved, other = state(0), state(1)
    step(saved, 1)
    saved.skip()
    saved.ledger.commit(1, [1])
    assert {"algorithm.lam", "algorithm.rates"} < saved.tensors().keys()
    checkpoints.save(tmp_path, 2, saved.tensors(), saved.facts())
    other.restore(*checkpoints.load_newest(tmp_path))
    assert (other.updates, other.skipped_in_a_row, other.step) == (1, 1, 2)
    assert sha256_of(other.tensors()) == sha256_of(saved.tensors())
    for subject in (saved, other):
        step(subject, 2)
    assert sha256_of(other.tensors()) == sha256_of(saved.tensors())


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            {"lam": torch.rand(2)},
            r"'algorithm\.lam' has shape \(2,\) of torch\.float32, this algorithm's has shape \(1,\)",
        ),
        ({"lam": torch.rand(1).double()}, r"'algorithm\.lam' has shape \(1,\) of torch\.float64"),
        ({"other": torch.rand(1)}, r"'algorithm\.lam' does not exist, this algorithm's has shape"),
        ({"lam": torch.rand(1), "kappa": torch.rand(1)}, r"'algorithm\.kappa' has shape .*, this algorithm's does not"),
    ],
)
def test_a_checkpoint_of_another_algorithm_is_refused_and_changes_nothing(own, says):
    here, there = _parameters(0, lam=torch.rand(1)), _parameters(1, **own)
    before = sha256_of(here.tensors())
    with pytest.raises(CheckpointError, match=says):
        here.load(there.tensors())
    assert sha256_of(here.tensors()) == before
