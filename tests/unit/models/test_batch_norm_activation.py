"""The fused layer is torch's two layers, also where a policy has its say."""

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist.models.activation import Activation
from imaml_dist.models.batch_norm_activation import BatchNormActivation2d
from imaml_dist.models.functional import FunctionalModel

TORCHS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "softplus": nn.Softplus(2.0, threshold=40.0)}


def pair(activation: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's two layers, with the same parameters."""
    fused = BatchNormActivation2d(3, Activation(activation, 2.0 if activation == "softplus" else 1.0)).double()
    plain = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), TORCHS[activation]).double()
    with torch.no_grad():
        for value in (fused.weight, fused.bias):
            value.copy_(torch.randn(3, dtype=torch.float64))
    plain[0].load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("activation", TORCHS)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchs_two_layers(training, activation):
    fused, plain = (module.train(training) for module in pair(activation))
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    said = f"{activation}, beta=2.0" if activation == "softplus" else activation
    assert repr(fused) == f"BatchNormActivation2d(\n  3, eps=1e-05\n  (activation): Activation({said})\n)"


@pytest.mark.parametrize("activation", TORCHS)
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=NATIVE)])
def test_query_samples_classified_alone_use_the_support_samples_statistics(native, activation):
    """Here the fused kernel must step aside."""
    support, query = torch.randn(2, 2, 6, 3, 4, 4, dtype=torch.float64)
    found = []
    for module in pair(activation):
        model = FunctionalModel(module, native=native)
        params = torch.stack([model.parameters(), 2 * model.parameters()])
        found.append(model.predict_inductive(params, support, query))
        alone = model.predict_inductive(params, support, query[:, :1])
        torch.testing.assert_close(alone, found[-1][:, :1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
