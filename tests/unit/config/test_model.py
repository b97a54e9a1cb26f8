"""The networks that come with the package in the configuration: their activations, and a beta that would have no effect."""

import pytest
import torch

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import make_model
from imaml_dist.errors import ConfigError


def model(*overrides):
    return build_config({"name": "t"}, [f"model.{each}" for each in overrides]).model


def test_the_rectifier_is_the_default_of_conv4_and_silu_that_of_the_mlp():
    assert (model().activation, model("kind=mlp").activation) == ("relu", "silu")


@pytest.mark.parametrize("kind", ["conv4", "mlp"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "softplus"])
def test_what_is_configured_is_what_is_made(kind, activation):
    beta = 4.0 if activation == "softplus" else 1.0
    overrides = [f"kind={kind}", f"activation={activation}", *(["softplus_beta=4"] if activation == "softplus" else [])]
    made = make_model(model(*overrides), (1, 28, 28), 5, seed=3)
    used = {(layer.name, layer.beta) for layer in made.modules() if type(layer).__name__ == "Activation"}
    assert used == {(activation, beta)}
    plain = make_model(model(f"kind={kind}"), (1, 28, 28), 5, seed=3).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["softplus_beta=2"], r"model\.softplus_beta: 2\.0 given, but 'relu' has no softplus_beta; remove it or change model\.act"),
        (["kind=mlp", "softplus_beta=2.5"], r"model\.softplus_beta: 2\.5 given, but 'silu' has no softplus_beta"),
        (["activation=gelu", "softplus_beta=2.5"], r"model\.softplus_beta: 2\.5 given, but 'gelu' has no softplus_beta"),
        (["activation=softplus", "softplus_beta=0"], r"model\.softplus_beta: 0 given, should be greater than 0"),
        (["activation=tanh"], r"model\.activation: 'tanh' given, should be 'relu', 'silu', 'gelu' or 'softplus'"),
        (["activations=silu"], r"model\.activations: is not a known field; .*activation"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        model(*overrides)
    assert "\n" not in str(caught.value)
