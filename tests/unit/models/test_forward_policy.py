"""Normalisation, dropout and attention inside of an objective, against torch's own layers and formulas."""

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn
from torch.nn import functional as F

from imaml_dist.errors import ModelError
from imaml_dist.kernels import native
from imaml_dist.models.attention import attention
from imaml_dist.models.forward_policy import ForwardPolicy
from imaml_dist.models.functional import FunctionalModel

KEY = torch.tensor(77)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_drop(x, p):
    raise AssertionError("nothing is to be dropped")


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_normalisation_uses_batch_or_frozen_statistics_and_writes_none(tasks, training, momentum):
    layer = nn.BatchNorm1d(4, momentum=momentum).double()
    layer.running_mean.copy_(draw(4, seed=1))
    layer.running_var.copy_(draw(4, seed=2).exp())
    module = nn.Sequential(nn.Linear(3, 4).double(), layer).train(training)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    functional, x = FunctionalModel(module), draw(tasks, 6, 3)
    outputs = functional.predict(functional.parameters().expand(tasks, -1), x)
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    for t in range(tasks):
        hidden = module[0](x[t])
        mean, variance = (
            (hidden.mean(0), hidden.var(0, correction=0)) if training else (layer.running_mean, layer.running_var)
        )
        expected = (hidden - mean) / (variance + layer.eps).sqrt()
        torch.testing.assert_close(outputs[t], expected, rtol=1e-10, atol=1e-10)


def test_instance_normalisation_with_running_statistics_writes_none():
    module = nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)).double()
    functional, x = FunctionalModel(module), draw(2, 5, 2, 7)
    outputs = functional.predict(functional.parameters().expand(2, -1), x)
    torch.testing.assert_close(outputs[1], F.instance_norm(x[1]), rtol=1e-10, atol=1e-10)
    assert int(module[0].num_batches_tracked) == 0 and not module[0].running_mean.any()


@pytest.mark.parametrize("tasks", [1, 2])
def test_inductive_outputs_use_the_statistics_of_the_support_samples(tasks):
    module = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    module(draw(4, 1, 5))
    functional, support, query = FunctionalModel(module), draw(tasks, 4, 1, 5, seed=1), draw(tasks, 6, 1, 5, seed=2)
    params = functional.parameters().expand(tasks, -1)
    found = functional.predict_inductive(params, support, query)
    for t in range(tasks):
        hidden = module[0](support[t])
        mean, variance = (
            s(hidden.transpose(0, 1).flatten(1)) for s in (lambda h: h.mean(1), lambda h: h.var(1, False))
        )
        normal = (module[0](query[t]) - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        torch.testing.assert_close(found[t], module[2:](normal), rtol=1e-9, atol=1e-9)
    alone = [functional.predict_inductive(params, support, query[:, i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone, 1), found, rtol=1e-10, atol=1e-10)


def test_without_batch_statistics_inductive_and_transductive_outputs_are_equal():
    functional = FunctionalModel(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double())
    params, x = functional.parameters()[None], draw(1, 5, 3)
    assert torch.equal(functional.predict_inductive(params, draw(1, 4, 3, seed=1), x), functional.predict(params, x))


def test_a_network_that_mixes_samples_otherwise_has_no_inductive_outputs():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    functional = FunctionalModel(Centred(3, 2).double())
    with pytest.raises(ModelError, match="Centred mixes the samples of a batch in another way"):
        functional.predict_inductive(functional.parameters()[None], draw(1, 4, 3), draw(1, 5, 3))


@pytest.mark.parametrize("normalised", [True, False])
def test_what_a_task_cannot_tell_about_independence_is_asked_of_the_next_and_never_remembered(normalised):
    """Outputs that overflow say nothing of whether samples depend on each other, nor do equal whole numbers."""
    layer = nn.BatchNorm1d(2) if normalised else nn.LayerNorm(2)
    functional = FunctionalModel(nn.Sequential(nn.Linear(3, 2), layer, nn.Linear(2, 2)).double())
    params, x = functional.parameters().expand(2, -1), draw(2, 5, 3)
    huge = x.clone()
    huge[0] *= 1e308
    assert functional.samples_independent(huge[:1]) is False
    assert functional.samples_independent(huge) is not normalised, "the second task tells"
    assert functional.samples_independent(huge[:1]) is not normalised, "for good"
    functional = FunctionalModel(functional.module)
    first = functional.predict_inductive(params[:1], huge[:1], huge[:1, :2])
    assert not first.isfinite().any()
    found = functional.predict_inductive(params, huge, huge[:, :2])[1]
    alone = [FunctionalModel(functional.module).predict_inductive(params[1:], x[1:], x[1:, i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(found, torch.cat(alone, 1)[0])


def test_samples_of_one_task_alone_are_enough_to_tell():
    functional = FunctionalModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    assert functional.samples_independent(draw(1, 1, 3))
    functional = FunctionalModel(nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2)).double())
    assert not functional.samples_independent(draw(1, 1, 1, 3))


def test_dropout_is_told_with_keys_also_where_it_was_asked_without_before():
    functional = FunctionalModel(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double())
    assert functional.samples_independent(draw(1, 4, 3))
    assert not functional.samples_independent(draw(1, 4, 3), KEY[None])


def test_equal_tokens_tell_nothing_and_are_evaluated_one_by_one():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 2)

        def forward(self, x):
            hidden = self.embedding(x).mean(1)
            return hidden - hidden.mean(0)

    functional, same = FunctionalModel(Centred()), torch.full((1, 3, 4), 2)
    params = functional.parameters()[None]
    assert not functional.predict_inductive(params, same, same).any(), "each is its own mean"
    with pytest.raises(ModelError, match="Centred mixes the samples"):
        functional.predict_inductive(params, same, torch.arange(12).remainder(5).reshape(1, 3, 4))


@pytest.mark.parametrize("tasks", [1, 2])
def test_batch_normalisation_of_one_value_per_channel_is_refused_in_one_sentence(tasks):
    functional = FunctionalModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    params = functional.parameters().expand(tasks, -1)
    with pytest.raises(
        ModelError, match=r"shape \(1, 4\): one value per channel has no statistics; give two"
    ) as caught:
        functional.predict(params, draw(tasks, 1, 3))
    assert "\n" not in str(caught.value)
    functional.module.eval()
    assert functional.predict(params, draw(tasks, 1, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("function", "shape", "slices"),
    [
        (F.dropout, (40, 50), (40, 50)),
        (torch.dropout, (40, 50), (40, 50)),
        (F.dropout1d, (40, 50, 3), (40, 50)),
        (F.dropout1d, (2000, 3), (2000,)),
        (F.dropout2d, (40, 50, 3, 2), (40, 50)),
        (F.dropout3d, (40, 50, 2, 2, 2), (40, 50)),
        (F.dropout3d, (2000, 2, 2, 2), (2000,)),
    ],
)
def test_dropped_slices_are_zero_and_the_others_are_enlarged(function, shape, slices):
    x = draw(*shape).abs() + 0.1
    with ForwardPolicy(KEY):
        y, again = function(x, 0.25, True), function(x, 0.25, True)
    with ForwardPolicy(KEY):
        repeated = function(x, 0.25, True)
    assert torch.equal(y, repeated), "the first dropout of a forward pass with this key"
    assert not torch.equal(y, again), "the second one"
    kept = (y != 0).reshape(*slices, -1)
    assert bool((kept.all(-1) | ~kept.any(-1)).all()), "slices are dropped whole"
    assert abs(float(kept[..., 0].double().mean()) - 0.75) < 0.05
    torch.testing.assert_close(y[y != 0], (x / 0.75)[y != 0], rtol=1e-12, atol=0)


def test_nothing_is_dropped_without_a_key_in_evaluation_or_at_probability_0():
    x = draw(5, 5)
    with ForwardPolicy():
        assert torch.equal(F.dropout(x, 0.5, True), x)
    with ForwardPolicy(KEY):
        assert torch.equal(F.dropout(x, 0.5, False), x)
        assert torch.equal(F.dropout(x, 0.0, True), x)
        assert not F.dropout(x, 1.0, True).any()
        inplace = x.clone()
        F.dropout(inplace, 0.5, True, True)
        assert not torch.equal(inplace, x)


@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout_keeps_mean_and_variance(function):
    x = draw(400, 500)
    with ForwardPolicy(KEY):
        y = function(x, 0.3, True)
    assert abs(float(y.mean())) < 0.02 and abs(float(y.var()) - 1) < 0.03
    assert torch.equal(y.unique(return_counts=True)[1].topk(2).values > 1, torch.tensor([True, False]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": draw(5, 6)},
        {"attn_mask": draw(2, 1, 5, 6) > -0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_attention_is_that_of_torch(options):
    q, k, v = draw(2, 4, 5, 8), draw(2, 4, 6, 8, seed=1), draw(2, 4, 6, 3, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(attention(q, k, v, **options, dropout=no_drop), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_attends_to_nothing_is_that_of_torch(added):
    """As the padding on the left of a sequence under a causal mask."""
    mask = torch.ones(5, 5).tril().bool() & (torch.arange(5) > 1)
    mask = torch.zeros(5, 5).double().masked_fill(~mask, -torch.inf) if added else mask
    given = tuple(draw(2, 1, 5, 3, seed=seed).requires_grad_() for seed in range(3))

    def run(function, **options):
        output = function(*given, mask, **options)
        return output, *torch.autograd.grad(output.square().sum(), given)

    found, expected = run(attention, dropout=no_drop), run(F.scaled_dot_product_attention)
    assert not found[0][:, :, :2].any()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.autograd.gradgradcheck(lambda *given: attention(*given, mask, dropout=no_drop), given)


def test_grouped_heads_are_those_of_torch():
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 3, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, enable_gqa=True, dropout=no_drop), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multi_head_attention_is_that_of_torch_and_can_be_differentiated_twice(need_weights, masked):
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = draw(3, 5, 8)
    mask = torch.ones(5, 5).triu(1).bool() if masked else None
    expected = layer(x, x, x, need_weights=need_weights, attn_mask=mask)[0]

    def run(x):
        with ForwardPolicy(KEY):
            return layer(x, x, x, need_weights=need_weights, attn_mask=mask)[0]

    torch.testing.assert_close(run(x), expected, rtol=1e-10, atol=1e-12)
    torch.autograd.gradgradcheck(run, (x[:1, :3] if mask is None else x[:1]).clone().requires_grad_())


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_weights_are_dropped_by_the_key(need_weights):
    layer = nn.MultiheadAttention(4, 1, dropout=0.5, bias=False, batch_first=True).double()
    x = draw(1, 6, 4)

    def run(key):
        with ForwardPolicy(key) as policy:
            return layer(x, x, x, need_weights=need_weights)[0], policy.dropped

    (first, count), (again, _), (other, _) = run(KEY), run(KEY), run(KEY + 1)
    assert count == 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(run(None)[0], layer.eval()(x, x, x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_normalisation_is_that_of_torch_with_a_right_second_derivative(dim):
    v, g = draw(3, 4), draw(4, seed=1)
    g = {0: g[:3, None], 1: g[None], -1: g[0]}[dim].clone()

    def run(v, g):
        with ForwardPolicy():
            return torch._weight_norm(v, g, dim)

    expected = g * v / (v.norm() if dim == -1 else v.norm(dim=1 - dim, keepdim=True))
    torch.testing.assert_close(run(v, g), expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradgradcheck(lambda v, g: run(v, g) ** 2, (v.requires_grad_(), g.requires_grad_()))


@pytest.mark.parametrize("padding", [2, -1])
def test_padding_of_an_embedding_has_no_gradient_also_where_tasks_are_vectorised(padding):
    functional = FunctionalModel(nn.Embedding(4, 3, padding_idx=padding).double())
    tokens = torch.tensor([[[0, 2], [3, 1]], [[2, 2], [3, 0]]])
    params = (functional.parameters() + draw(2, 12)).requires_grad_()
    (together,) = torch.autograd.grad(functional.predict(params, tokens).square().sum(), params)
    alone = [
        torch.autograd.grad(functional.predict(params[t : t + 1], tokens[t : t + 1]).square().sum(), params)[0]
        for t in (0, 1)
    ]
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=0, atol=0)
    rows = together.reshape(2, 4, 3).abs().sum(-1) > 0
    assert not rows[:, padding].any()
    assert rows[0].sum() == 3


@NATIVE
@pytest.mark.parametrize(
    "after",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view((x.size(0), -1)),
        lambda x: x.flatten(1),
        lambda x: F.group_norm(x, 2),
        lambda x: F.instance_norm(x),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.pad(x, (1, 0, 0, 2)),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.conv2d(x, x.new_ones(4, 1, 3, 3), groups=4, padding="same"),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.dropout2d(F.gelu(x), 0.0),
    ],
)
def test_what_follows_our_kernels_takes_their_results(after):
    native.load()
    x, w = torch.randn(3, 2, 1, 6, 6, dtype=torch.float64), torch.randn(3, 4, 1, 3, 3, dtype=torch.float64)

    def evaluate(x, w):
        with ForwardPolicy(native=True):
            return after(F.conv2d(x, w, padding=1))

    expected = torch.stack([after(F.conv2d(x[t], w[t], padding=1)) for t in range(3)])
    torch.testing.assert_close(torch.func.vmap(evaluate)(x, w), expected)
    torch.testing.assert_close(evaluate(x[0], w[0]), expected[0])
