"""From configuration to the objects of a run: losses of the user's own, and solvers that do not fit."""

import json

import pytest
import torch
from helpers.runs import tiny

from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed import build
from imaml_dist.distributed.build import make_learner, make_loss, make_source
from imaml_dist.errors import ConfigError, LossError

LOSSES = """
constant = 5
from torch.nn.functional import cross_entropy
def smoothed(outputs, labels):
    return cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=0.1).reshape(labels.shape).mean(-1)
def over_all(outputs, labels):
    return smoothed(outputs, labels).mean()
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_loss_of_ones_own_is_what_is_minimised(data, losses):
    config = tiny(data, "loss=my_losses:smoothed")
    source = make_source(config, Dataset(config.data.url), "train")
    episodes = source.episodes(0, range(2))
    own, plain = (make_learner(c, source.image_shape) for c in (config, tiny(data)))
    for learner, loss in ((own, make_loss("my_losses:smoothed")), (plain, make_loss("cross_entropy"))):
        found = learner.task_gradients(episodes).tasks
        phi = learner.adapt_parameters(episodes.support_x, episodes.support_y).params
        expected = loss(learner.functional.predict(phi, episodes.query_x), episodes.query_y)
        torch.testing.assert_close(found.query_loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        ({"kind": "direct"}, r"algorithm.solver.max_size: 4096 given, but \d+ parameters adapt, .*; raise it, let fewer"),
        ({"kind": "nystrom", "rank": 10**6}, r"algorithm.solver.rank: 1000000 given, must be at most \d+, .*; lower it"),
        ({"kind": "conjugate_gradient", "preconditioner": "nystrom", "rank": 10**6}, r"algorithm.solver.rank: 1000000 given"),
        ({"kind": "dual"}, r"algorithm.solver.kind: dual given, which takes .* GiB for the 6 x \d+ numbers .*; let fewer"),
    ],
)  # fmt: skip
def test_a_solver_that_does_not_fit_the_network_is_refused_before_the_first_task(data, solver, says, monkeypatch):
    monkeypatch.setattr(build, "MAX_BYTES", 1 << 20)
    config = tiny(data, "model={kind: mlp, hidden: [64]}", f"algorithm={{kind: imaml, solver: {json.dumps(solver)}}}")
    shape = Dataset(config.data.url).index.image_shape
    with pytest.raises(ConfigError, match=says) as caught:
        make_learner(config, shape)
    assert "\n" not in str(caught.value)
    if "rank" not in solver:
        head = config.algorithm.model_copy(update={"adapts": ["layers.3.bias"]})
        make_learner(config.model_copy(update={"algorithm": head}), shape)


def test_a_loss_that_cannot_be_imported_or_is_not_one_number_a_task_is_refused(data, losses):
    for name in ("no_such_module:f", "my_losses:missing", "my_losses:constant"):
        with pytest.raises(ConfigError, match=rf"loss: '{name}' cannot be used .*outputs \[T, n, N\]"):
            make_loss(name)
    config = tiny(data, "loss=my_losses:over_all")
    source = make_source(config, Dataset(config.data.url), "train")
    with pytest.raises(LossError, match=r"the loss of 2 tasks, .*, has shape \(\), should be a tensor of shape \(2,\)"):
        make_learner(config, source.image_shape).preflight(source.episodes(0, range(2)))
