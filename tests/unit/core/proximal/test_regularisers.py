"""Every regulariser against its dense matrix, and its gradient against differentiation of the dense form."""

import pytest
import torch

from imaml_dist.core.proximal.kronecker import KroneckerProximal
from imaml_dist.core.proximal.low_rank import LowRankProximal
from imaml_dist.core.proximal.parametrisation import LARGEST_SIDE, Parametrisation
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.core.vector import ParameterLayout

KINDS = ["scalar", "per_layer", "diagonal", "low_rank", "kronecker"]
LAYOUT = ParameterLayout(("a.weight", "a.bias", "b.weight", "scale"), ((3, 2, 2), (3,), (2, 3), ()))
P, TASKS = LAYOUT.size, 4


def parametrisation(kind):
    return Parametrisation(kind, LAYOUT, rank=3)


def perturbed(kind, seed=0):
    """Unconstrained parameters away from the isotropic start."""
    raw = parametrisation(kind).initial(0.7, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.4 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in raw.items()}


def dense(kind, raw):
    """Lambda written out by hand from the unconstrained parameters, differentiable."""
    if kind == "scalar":
        return torch.eye(P, dtype=torch.float64) * raw["log_strength"].exp()
    if kind == "per_layer":
        a, b, own = raw["log_strengths"].exp()
        return torch.diag(torch.cat([a.expand(15), b.expand(6), own.expand(1)]))
    if kind == "diagonal":
        return torch.diag(raw["log_strengths"].exp())
    if kind == "low_rank":
        return torch.diag(raw["log_strengths"].exp()) + raw["factor"] @ raw["factor"].T

    def factor(name):
        lower = raw[name].tril(-1) + torch.diag(torch.diagonal(raw[name]).exp())
        return lower @ lower.T

    return torch.block_diag(
        torch.kron(factor("a.weight.left"), factor("a.weight.right")),
        torch.diag(raw["a.bias.log_strengths"].exp()),
        torch.kron(factor("b.weight.left"), factor("b.weight.right")),
        torch.diag(raw["scale.log_strengths"].exp()),
    )


@pytest.fixture(params=KINDS)
def case(request):
    raw = perturbed(request.param)
    return request.param, raw, parametrisation(request.param).build(raw), dense(request.param, raw)


def vectors(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TASKS, P, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_products_values_and_diagonal_are_those_of_the_dense_matrix(case):
    _, _, proximal, matrix = case
    (v,) = vectors(1)
    torch.testing.assert_close(proximal.apply(v), v @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(proximal.value(v), 0.5 * torch.einsum("ti,ij,tj->t", v, matrix, v), rtol=1e-12, atol=0)
    torch.testing.assert_close(proximal.diagonal().expand(P), matrix.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_solve_inverts_the_dense_matrix_on_any_leading_axes(case, shift):
    _, _, proximal, matrix = case
    v = torch.stack(vectors(3))
    expected = torch.linalg.solve(matrix + shift * torch.eye(P, dtype=torch.float64), v.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(proximal.solve(v, shift), expected, rtol=1e-10, atol=1e-10)


def test_every_regulariser_is_positive_definite_whatever_its_unconstrained_parameters(case):
    kind, raw, _, _ = case
    for size in (-3.0, 3.0):
        wild = {name: size * value for name, value in raw.items()}
        assert float(torch.linalg.eigvalsh(dense(kind, wild)).min()) > 0


def test_gradient_is_the_derivative_of_the_dense_form_for_every_task(case):
    """dF/dLambda = -u' dLambda delta, through the parametrisation, by torch's own differentiation of the dense matrix."""
    kind, raw, proximal, _ = case
    u, delta = vectors(2)
    rows = parametrisation(kind).pull_back(raw, proximal.gradient(u, delta))
    assert rows.keys() == raw.keys()
    for t in range(TASKS):
        leaves = {name: value.clone().requires_grad_(True) for name, value in raw.items()}
        value = -(u[t] @ dense(kind, leaves) @ delta[t])
        expected = torch.autograd.grad(value, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(rows[name][t], gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_regulariser_is_the_scalar_one(kind):
    raw = parametrisation(kind).initial(1.7, torch.float64)
    matrix, identity = dense(kind, raw), torch.eye(P, dtype=torch.float64)
    if kind == "low_rank":  # plus a small random part, without which the factor's gradient would vanish
        extra = matrix - 1.7 * identity
        assert 0 < float(torch.trace(extra)) < 3 * 0.1 * 1.7 * 2
    else:
        torch.testing.assert_close(matrix, 1.7 * identity, rtol=1e-12, atol=1e-12)


def test_misuse_is_refused():
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            parametrisation("diagonal").initial(strength)
        with pytest.raises(ValueError, match="lam"):
            ScalarProximal(strength)
    for rank in (0, P + 1):
        with pytest.raises(ValueError, match="rank"):
            Parametrisation("low_rank", LAYOUT, rank=rank)
    with pytest.raises(ValueError, match=r"'w' .* too large"):
        Parametrisation("kronecker", ParameterLayout(("w",), ((2, LARGEST_SIDE + 1),)))


NAMED = ParameterLayout(
    ("body.0.weight", "body.0.bias", "body.1.weight", "head.weight", "head.bias"), ((2, 3), (2,), (4,), (3, 2), (3,))
)


@pytest.mark.parametrize("kind", ["per_layer", "diagonal"])
def test_layers_have_strengths_of_their_own_and_the_longest_name_counts(kind):
    subject = Parametrisation(kind, NAMED)
    raw = subject.initial(2.0, torch.float64, {"head": 0.25, "body": 3.0, "body.1": 5.0})
    expected = torch.tensor([3.0] * 8 + [5.0] * 4 + [0.25] * 9, dtype=torch.float64)
    torch.testing.assert_close(subject.build(raw).diagonal(), expected, rtol=1e-14, atol=0)
    others = subject.build(subject.initial(2.0, torch.float64, {"head": 0.25})).diagonal()
    torch.testing.assert_close(others[:12], torch.full((12,), 2.0, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("kind", "layers", "sentence"),
    [
        ("per_layer", {"hea": 0.1}, "'hea' names no parameter; there are body.0.weight"),
        ("per_layer", {"head.bias": 0.1}, "'head.bias' is given 0.1 and another part of its layer 2.0"),
        ("diagonal", {"head": 0.0}, "positive finite number, got 0.0"),
        ("scalar", {"head": 0.1}, "not with scalar"),
        ("kronecker", {"head": 0.1}, "not with kronecker"),
    ],
)
def test_strengths_of_layers_that_mean_nothing_are_refused(kind, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        Parametrisation(kind, NAMED).initial(2.0, layers=layers)


def test_a_part_of_a_layer_has_a_strength_of_its_own_in_a_diagonal():
    subject = Parametrisation("diagonal", NAMED)
    found = subject.build(subject.initial(2.0, torch.float64, {"head.bias": 0.5})).diagonal()
    torch.testing.assert_close(found[-4:], torch.tensor([2.0, 0.5, 0.5, 0.5], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("strength", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("between", [1e-2, 1e-4, 1e-6])
def test_a_low_rank_solve_of_nearly_parallel_columns_stays_positive_definite(strength, between):
    """`I + U'D^-1 U` is then so large that float32 loses its smallest eigenvalue, which is 1 at least."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        column = torch.randn(40, 1, generator=generator)
        factor = column + between * torch.randn(40, 1 + seed % 5, generator=generator)
        v = torch.randn(20, 40, generator=generator)
        found = LowRankProximal(torch.full((40,), strength), factor).solve(v)
        assert found.isfinite().all() and ((v * found).sum(-1) > 0).all()


def test_a_low_rank_regulariser_of_full_rank_is_solved_in_every_shift():
    generator = torch.Generator().manual_seed(0)
    strengths, factor = (
        0.1 + torch.rand(3, generator=generator).double(),
        torch.randn(3, 3, generator=generator).double(),
    )
    v, subject = torch.randn(4, 3, generator=generator).double(), LowRankProximal(strengths, factor)
    for shift in (0.0, 0.5, 0.0, 2.0):
        dense = torch.diag(strengths + shift) + factor @ factor.T
        torch.testing.assert_close(subject.solve(v, shift), torch.linalg.solve(dense, v.T).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decades", [2, 4, 6])
def test_a_kronecker_solve_of_ill_conditioned_factors_stays_positive_definite(decades):
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout(("weight",), ((8, 8),))

    def factor():
        q, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
        return ((q * torch.logspace(0, -2 * decades, 8, dtype=torch.float64)) @ q.mT).float()

    v = torch.randn(20, 64, generator=generator)
    found = KroneckerProximal(layout, {"weight.left": factor(), "weight.right": factor()}).solve(v)
    assert found.isfinite().all() and ((v * found).sum(-1) > 0).all()
