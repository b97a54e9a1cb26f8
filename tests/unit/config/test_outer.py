"""The outer optimiser and the warm start in the configuration: defaults, and fields that would have no effect."""

import pytest

from imaml_dist.config.load import build_config
from imaml_dist.errors import ConfigError


def config(*overrides):
    return build_config({"name": "t"}, overrides)


def test_defaults_are_those_of_torch_and_nothing_is_warm():
    c = config()
    assert (c.outer.optimizer, c.outer.beta1, c.outer.beta2, c.outer.eps) == ("adam", 0.9, 0.999, 1e-8)
    assert (c.outer.momentum, c.outer.nesterov, c.run.give_up_after) == (0.0, False, 10)
    assert (c.warm_start.path, c.warm_start.skip) == (None, [])


def test_every_optimiser_takes_its_own_fields():
    assert config("outer.optimizer=sgd", "outer.momentum=0.9", "outer.nesterov=true").outer.nesterov
    assert config("outer.optimizer=adamw", "outer.beta1=0.5", "outer.eps=1e-3").outer.eps == 1e-3
    assert config("warm_start.path=runs/a", "warm_start.skip=[head]").warm_start.skip == ["head"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["outer.momentum=0.9"], r"outer\.momentum: 0\.9 given, but 'adam' has no momentum; remove it or change outer\.opt"),
        (["outer.optimizer=adamw", "outer.nesterov=true"], r"outer\.nesterov: True given, but 'adamw' has no nesterov"),
        (["outer.optimizer=sgd", "outer.beta2=0.9"], r"outer\.beta2: 0\.9 given, but 'sgd' has no beta2"),
        (["outer.optimizer=sgd", "outer.nesterov=true"], r"outer\.nesterov: True given, but it needs momentum"),
        (["outer.optimizer=sgd", "outer.momentum=1"], r"outer\.momentum: 1 given, should be less than 1"),
        (["outer.beta1=1.0"], r"outer\.beta1: 1\.0 given, should be less than 1"),
        (["outer.eps=0"], r"outer\.eps: 0 given, should be greater than 0"),
        (["run.give_up_after=0"], r"run\.give_up_after: 0 given, should be greater than or equal to 1"),
        (["warm_start.skip=[head]"], r"warm_start\.skip: \['head'\] given without warm_start\.path"),
        (["warm_start.file=x"], r"warm_start\.file: is not a known field; warm_start takes path, skip"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)
