"""The fused layer is torch's two layers, also where a policy has its say."""

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist.models.activation import Activation
from imaml_dist.models.batch_norm_activation import BatchNormActivation2d
from imaml_dist.models.functional import FunctionalModel


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()).double()


def pair() -> tuple[nn.Module, nn.Module]:
    fused, plain = BatchNormActivation2d(3, Activation("relu")).double(), two_layers()
    with torch.no_grad():
        for value in (fused.weight, fused.bias):
            value.copy_(torch.randn(3, dtype=torch.float64))
    plain[0].load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchs_two_layers(training):
    fused, plain = (module.train(training) for module in pair())
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)
    assert repr(fused) == "BatchNormActivation2d(\n  3, eps=1e-05\n  (activation): Activation(relu)\n)"


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=NATIVE)])
def test_query_samples_classified_alone_use_the_support_samples_statistics(native):
    """Here the fused kernel must step aside."""
    support, query = torch.randn(2, 2, 6, 3, 4, 4, dtype=torch.float64)
    found = []
    for module in pair():
        model = FunctionalModel(module, native=native)
        params = torch.stack([model.parameters(), 2 * model.parameters()])
        found.append(model.predict_inductive(params, support, query))
        alone = model.predict_inductive(params, support, query[:, :1])
        torch.testing.assert_close(alone, found[-1][:, :1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
