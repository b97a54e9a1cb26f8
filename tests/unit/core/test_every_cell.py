"""Every regulariser with every linear solver and every curvature operator, in theta and in Lambda's own parameters.

Truths: the closed form of quadratic tasks, differentiated; fourth-order central differences through a converged inner solve
of a tanh network with an indefinite Hessian; dense Gauss-Newton algebra.
"""

from functools import cache, partial

import pytest
import torch
from helpers.problems import Quadratics, TanhRegression, dense_gauss_newton, dense_hessian, minimise_with

from imaml_dist.core.curvature import gauss_newton_operator
from imaml_dist.core.implicit import implicit_meta_gradient
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.direct import direct
from imaml_dist.core.linear.dual import dual_gauss_newton
from imaml_dist.core.linear.minres import minres
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.nystrom import nystrom, nystrom_preconditioner
from imaml_dist.core.proximal.parametrisation import Parametrisation
from imaml_dist.core.vector import ParameterLayout

TASKS, P = 3, TanhRegression.SIZE
LAYOUT = ParameterLayout(("first.weight", "first.bias", "second.weight", "second.bias"), ((4, 1), (4,), (1, 4), (1,)))
REGULARISERS = ["scalar", "per_layer", "diagonal", "low_rank", "kronecker"]


def _preconditioned(preconditioner, system, v):
    return conjugate_gradient(system, v, max_iterations=100, rtol=1e-14, preconditioner=preconditioner(system, v))


SOLVERS = {
    "conjugate_gradient": partial(conjugate_gradient, max_iterations=100, rtol=1e-14),
    "cg_regulariser": partial(_preconditioned, lambda system, v: system.regulariser_solve),
    "cg_nystrom": partial(_preconditioned, lambda system, v: nystrom_preconditioner(system, v, rank=5)),
    "minres": partial(minres, max_iterations=100, rtol=1e-14),
    "neumann": partial(neumann, max_iterations=20_000, rtol=1e-12),
    "nystrom_full_rank": partial(nystrom, rank=P),
    "direct": direct,
    "dual": dual_gauss_newton,
}
CELLS = [
    pytest.param(kind, operator, name, id=f"{kind}-{operator}-{name}")
    for kind in REGULARISERS
    for operator in ("hessian", "gauss_newton")
    for name in SOLVERS
    if not (name == "dual" and operator == "hessian")
]


def parametrisation(kind):
    return Parametrisation(kind, LAYOUT, rank=2)


def raw_parameters(kind, strength, dtype=torch.float64):
    """Unconstrained parameters near `strength I`, of no symmetry."""
    generator = torch.Generator().manual_seed(5)
    raw = parametrisation(kind).initial(strength, torch.float64)
    return {
        n: (v + 0.15 * torch.randn(v.shape, generator=generator, dtype=torch.float64)).to(dtype) for n, v in raw.items()
    }


def matrix_of(kind, raw):
    """Lambda as a dense matrix, differentiable; `test_regularisers` proves the products behind it."""
    identity = torch.eye(P, dtype=next(iter(raw.values())).dtype)
    return parametrisation(kind).build(raw).apply(identity)


def theta(seed=7, scale=0.8):
    row = torch.randn(P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scale * row.expand(TASKS, -1)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def implicit(problem, phi, anchor, kind, raw, name, curvature):
    """Our theta- and Lambda-gradients."""
    found = implicit_meta_gradient(
        problem.support_loss,
        problem.query_loss,
        phi,
        anchor,
        proximal=parametrisation(kind).build(raw),
        solve=SOLVERS[name],
        curvature=curvature,
    )
    return found, parametrisation(kind).pull_back(raw, found.own)


@cache
def quadratic(kind):
    """Closed form: `phi* = (H + Lambda)^-1 (b + Lambda theta)`, the query loss differentiated by torch itself."""
    problem, raw = Quadratics.random(TASKS, P, seed=1), raw_parameters(kind, 0.7)
    rows, own, phis = [], [], []
    for t in range(TASKS):
        anchor = theta()[t].clone().requires_grad_(True)
        leaves = {name: value.clone().requires_grad_(True) for name, value in raw.items()}
        matrix = matrix_of(kind, leaves)
        phi = torch.linalg.solve(problem.hessian[t] + matrix, problem.linear[t] + matrix @ anchor)
        loss = 0.5 * ((phi - problem.target[t]) ** 2).sum()
        row, *others = torch.autograd.grad(loss, [anchor, *leaves.values()])
        rows.append(row)
        own.append(dict(zip(leaves, others, strict=True)))
        phis.append(phi.detach())
    return problem, raw, torch.stack(phis), torch.stack(rows), {n: torch.stack([o[n] for o in own]) for n in raw}


@pytest.mark.parametrize(("kind", "operator", "name"), CELLS)
def test_quadratic_tasks_against_the_closed_form(kind, operator, name):
    problem, raw, phi, expected, expected_own = quadratic(kind)
    curvature = problem.gauss_newton(phi) if operator == "gauss_newton" else None
    found, own = implicit(problem, phi, theta(), kind, raw, name, curvature)
    assert relative(found.gradient, expected) < 1e-8
    for parameter, rows in expected_own.items():
        assert relative(own[parameter], rows) < 1e-8, parameter


@pytest.mark.parametrize(("kind", "operator", "name"), CELLS)
def test_float32_keeps_four_digits_on_well_conditioned_systems(kind, operator, name):
    problem, raw, phi, expected, expected_own = quadratic(kind)
    spread = torch.linalg.eigvalsh(problem.hessian + matrix_of(kind, raw))
    assert float((spread[:, -1] / spread[:, 0]).max()) <= 50
    single = problem.to(torch.float32)
    raw32 = {n: v.float() for n, v in raw.items()}
    curvature = single.gauss_newton(phi.float()) if operator == "gauss_newton" else None
    found, own = implicit(single, phi.float(), theta().float(), kind, raw32, name, curvature)
    assert relative(found.gradient.double(), expected) < 1e-4
    for parameter, rows in expected_own.items():
        assert relative(own[parameter].double(), rows) < 1e-4, parameter


@cache
def tanh(kind):
    """Directional derivatives through the whole inner solve, along random directions of theta and of each of Lambda's parameters."""
    problem, raw = TanhRegression.random(TASKS, seed=16), raw_parameters(kind, 1.0)
    phi = minimise_with(problem.support_loss, theta(), matrix_of(kind, raw))
    spectrum = torch.linalg.eigvalsh(dense_hessian(problem.support_loss, phi))
    assert float(spectrum.min()) < -0.05, "the Hessian itself must be indefinite for this test to say anything"
    system = torch.linalg.eigvalsh(dense_hessian(problem.support_loss, phi) + matrix_of(kind, raw))
    assert float(system.min()) > 0.05
    generator, step, found = torch.Generator().manual_seed(3), 5e-4, []
    for name in ("theta", "theta", *raw):
        along = torch.randn(raw[name].shape if name in raw else (P,), dtype=torch.float64, generator=generator)

        def outer(size, name=name, along=along):
            anchor = theta() + size * along if name == "theta" else theta()
            moved = {n: v + size * along if n == name else v for n, v in raw.items()}
            minimum = minimise_with(problem.support_loss, anchor, matrix_of(kind, moved), start=phi)
            return problem.query_loss(minimum)

        # Fourth order, so that truncation lies below the 1e-8 that is asked for.
        slope = (8 * (outer(step) - outer(-step)) - (outer(2 * step) - outer(-2 * step))) / (12 * step)
        found.append((name, along, slope))
    return problem, raw, phi, found


@pytest.mark.parametrize("kind", REGULARISERS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "dual"])
def test_indefinite_tanh_network_against_central_differences_through_the_inner_solve(kind, name):
    problem, raw, phi, directions = tanh(kind)
    found, own = implicit(problem, phi, theta(), kind, raw, name, None)
    rows = {"theta": found.gradient, **own}
    for parameter, along, slope in directions:
        assert relative((rows[parameter] * along).reshape(TASKS, -1).sum(1), slope) < 1e-8, parameter


@pytest.mark.parametrize("kind", REGULARISERS)
@pytest.mark.parametrize("name", list(SOLVERS))
def test_gauss_newton_of_a_tanh_network_against_dense_algebra(kind, name):
    problem, raw, phi, _ = tanh(kind)
    loss = partial(problem.mean_squared_error, targets=problem.support_y)
    predict = partial(problem.predict, x=problem.support_x)
    found, own = implicit(problem, phi, theta(), kind, raw, name, gauss_newton_operator(predict, loss, phi))
    matrix, dense = matrix_of(kind, raw), dense_gauss_newton(predict, loss, phi)
    u = torch.linalg.solve(dense + matrix, found.first_order.unsqueeze(-1)).squeeze(-1)
    assert relative(found.gradient, u @ matrix) < 1e-8
    for t in range(TASKS):
        leaves = {n: v.clone().requires_grad_(True) for n, v in raw.items()}
        value = -(u[t] @ matrix_of(kind, leaves) @ (phi - theta())[t])
        for parameter, row in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            assert relative(own[parameter][t], row) < 1e-8, parameter


@pytest.mark.parametrize("kind", REGULARISERS)
@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_nystrom_error_falls_with_the_rank(operator, kind):
    problem, raw, phi, expected, _ = quadratic(kind)
    curvature = problem.gauss_newton(phi) if operator == "gauss_newton" else None
    errors = []
    for rank in (2, 6, 10, P):
        found = implicit_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            phi,
            theta(),
            proximal=parametrisation(kind).build(raw),
            solve=partial(nystrom, rank=rank),
            curvature=curvature,
        )
        errors.append(relative(found.gradient, expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 < errors[0]
