"""Where a type's digits or its range end: what a solver reports is still what dense float64 algebra finds."""

import math

import pytest
import torch
from helpers.algebra import matvec_of, symmetric

from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.direct import direct
from imaml_dist.core.linear.minres import minres
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.nystrom import nystrom_preconditioner
from imaml_dist.core.linear.solution import SLACK, Outcome
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.scalar import ScalarProximal

SOLVERS = {"conjugate_gradient": conjugate_gradient, "minres": minres, "neumann": neumann}
ENDED = {Outcome.CONVERGED, Outcome.MAX_ITERATIONS}


def spread(condition, size, tasks=5):
    """Float32 matrices of a known condition, in random bases."""
    spectrum = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return torch.stack([symmetric(spectrum, seed) for seed in range(tasks)]).float()


def right_side(tasks, size, seed=3):
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(seed))


def true_residual(a, b, x):
    a, b, x = a.double(), b.double(), x.double()
    return (b - torch.einsum("tij,tj->ti", a, x)).norm(dim=1) / b.norm(dim=1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("condition", [10, 100])
def test_a_budget_beyond_the_digits_neither_diverges_nor_blames_the_system(name, condition):
    """Recurrences go on below what the iterate can follow; squares of theirs end at the smallest number of the type."""
    a, b = spread(condition, 50), right_side(5, 50)
    solution = SOLVERS[name](matvec_of(a), b, max_iterations=2000)
    assert set(solution.outcome.tolist()) <= ENDED
    assert (true_residual(a, b, solution.value) < 3e-6 * condition**0.5).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_far_larger_than_the_right_side_ends_at_its_own_digits(name):
    a, x0 = spread(10, 50), right_side(5, 50)
    for b in (torch.zeros(5, 50), right_side(5, 50, seed=4) * 1e-25):
        solution = SOLVERS[name](matvec_of(a), b, max_iterations=2000, x0=x0)
        assert set(solution.outcome.tolist()) <= ENDED
        assert (solution.value.norm(dim=1) < 1e-4 * x0.norm(dim=1)).all()


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("kind", ["two", "spread"])
def test_conjugate_gradient_tells_the_true_residual_of_long_solutions(condition, kind):
    """Along small eigenvalues the iterate goes a long way, and so do the roundings of its products."""
    few = torch.cat([torch.ones(48), torch.tensor([1 / condition, 2 / condition])]).double()
    a = spread(condition, 50) if kind == "spread" else torch.stack([symmetric(few, seed) for seed in range(5)]).float()
    b = right_side(5, 50)
    for rtol in (0.0, 1e-3, 1e-2):
        solution = conjugate_gradient(matvec_of(a), b, max_iterations=20, rtol=rtol)
        found = true_residual(a, b, solution.value)
        assert (found < 2.5 * solution.residual + 1e-5).all()
        assert (found[solution.outcome == Outcome.CONVERGED] < 1.25 * SLACK * rtol + 1e-5).all()


def test_a_preconditioned_solve_of_a_hard_system_is_not_called_converged():
    curvature = torch.stack([symmetric(torch.logspace(0, 3, 40, dtype=torch.float64), s) for s in range(5)]).float()
    system, b = ProximalSystem(matvec_of(curvature), ScalarProximal(1e-4)), right_side(5, 40)
    solution = conjugate_gradient(
        system, b, max_iterations=60, rtol=1e-2, preconditioner=nystrom_preconditioner(system, b, rank=10)
    )
    found = true_residual(curvature + 1e-4 * torch.eye(40), b, solution.value)
    assert (found[solution.outcome == Outcome.CONVERGED] < 1.25 * SLACK * 1e-2).all()
    assert (found < 2.5 * solution.residual + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [6, 20, 60])
def test_minres_keeps_the_least_squares_solution_of_a_singular_system(dtype, size):
    spectrum = torch.cat([torch.zeros(size // 2), torch.linspace(-2, 3, size - size // 2) + 0.07]).double()
    a = torch.stack([symmetric(spectrum, seed) for seed in range(100)])
    b = right_side(100, size).double()
    best = true_residual(a, b, torch.einsum("tij,tj->ti", torch.linalg.pinv(a, rtol=1e-8), b))
    for budget in (size, 200):
        solution = minres(matvec_of(a.to(dtype)), b.to(dtype), max_iterations=budget)
        assert not solution.unsolved.any()
        assert (true_residual(a, b, solution.value) < 1.01 * best).all()


@pytest.mark.parametrize("large", [1e-25, 1e20, 1e30])
def test_a_dense_solve_tells_its_residual_however_large_the_right_side(large):
    a, b = spread(100, 8), right_side(5, 8)
    b = large * b
    solution = direct(matvec_of(a), b)
    found = true_residual(a, b, solution.value)
    assert (solution.residual > 0).all()
    assert (solution.residual - found).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("solve", "scale", "b"),
    [
        (conjugate_gradient, 1e-22, 1e18),
        (conjugate_gradient, 10.0, 1.5e19),
        (neumann, 1e-25, 1.0),
        (minres, 10.0, 3e19),
    ],
)
def test_beyond_the_range_the_value_stays_finite_and_nothing_converged(solve, scale, b):
    solution = solve(lambda p: scale * p, torch.full((1, 3), b), max_iterations=5, rtol=1e-3)
    assert solution.value.isfinite().all()
    if solution.outcome.tolist() == [Outcome.CONVERGED]:
        torch.testing.assert_close(solution.value, torch.full((1, 3), b / scale))
    else:
        assert solution.outcome.tolist() == [Outcome.NON_FINITE]


def test_a_huge_preconditioned_right_side_is_not_taken_for_solved():
    b = torch.full((1, 3), 1.5e19)
    solution = conjugate_gradient(lambda p: 10 * p, b, max_iterations=5, rtol=1e-3, preconditioner=lambda r: r / 10)
    assert solution.outcome.tolist() == [Outcome.NON_FINITE]
