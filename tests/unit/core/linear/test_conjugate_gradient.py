"""Conjugate gradient against dense float64 algebra, and its behaviour where there is no solution to find."""

import itertools

import pytest
import torch
from helpers.algebra import matvec_of, spd, symmetric

from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.solution import Outcome, relative_residual

TASKS, SIZE = 5, 8


@pytest.fixture
def system():
    a = spd(TASKS, SIZE, seed=1)
    return a, torch.randn(TASKS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_n_steps_solve_an_n_dimensional_system(system):
    a, b = system
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=SIZE + 2, rtol=1e-14)
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-12, atol=1e-12)
    assert (solution.residual <= 1e-12).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 1e-6, 1e6])
def test_scaling_the_system_scales_the_solution(system, scale):
    a, b = system
    solution = conjugate_gradient(matvec_of(scale * a), b, max_iterations=SIZE + 2, rtol=1e-13)
    torch.testing.assert_close(solution.value * scale, torch.linalg.solve(a, b), rtol=1e-11, atol=1e-11)


def test_identity_is_solved_in_one_step_and_the_converged_iterate_is_the_one_returned():
    b = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    solution = conjugate_gradient(lambda v: v, b, max_iterations=5)
    torch.testing.assert_close(solution.value, b, rtol=0, atol=0)
    assert solution.iterations.tolist() == [1, 1]
    assert solution.outcome.tolist() == [Outcome.CONVERGED] * 2


def test_zero_right_hand_side_is_solved_by_zero_without_a_step(system):
    a, _ = system
    solution = conjugate_gradient(matvec_of(a), torch.zeros(TASKS, SIZE, dtype=torch.float64), max_iterations=3)
    assert (solution.value == 0).all()
    assert (solution.residual == 0).all()
    assert (solution.iterations == 0).all()
    assert (solution.outcome == Outcome.CONVERGED).all()


def test_exact_start_needs_no_step(system):
    a, b = system
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=4, rtol=1e-10, x0=torch.linalg.solve(a, b))
    assert (solution.iterations == 0).all()
    assert (solution.outcome == Outcome.CONVERGED).all()


def test_start_is_used(system):
    a, b = system
    x0 = torch.randn(TASKS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=SIZE + 2, rtol=1e-13, x0=x0)
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-11, atol=1e-11)


def test_exact_preconditioner_solves_in_one_step(system):
    a, b = system
    inverse = torch.linalg.inv(a)
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=5, rtol=1e-10, preconditioner=matvec_of(inverse))
    assert (solution.iterations == 1).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)


def test_budget_that_ends_first_is_reported_with_the_true_residual(system):
    a, b = system
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=2)
    assert (solution.outcome == Outcome.MAX_ITERATIONS).all()
    assert (solution.iterations == 2).all()
    recomputed = (b - torch.einsum("tij,tj->ti", a, solution.value)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(solution.residual, recomputed, rtol=1e-12, atol=0)
    assert (solution.residual > 1e-3).all()


def test_every_step_lowers_the_error_in_the_norm_of_a(system):
    a, b = system
    exact = torch.linalg.solve(a, b)
    errors = []
    for steps in range(1, SIZE + 1):
        error = conjugate_gradient(matvec_of(a), b, max_iterations=steps).value - exact
        errors.append(torch.einsum("ti,tij,tj->t", error, a, error))
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier + 1e-12).all()


def test_negative_curvature_in_the_first_step_returns_the_start():
    a = torch.diag_embed(torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64))
    solution = conjugate_gradient(matvec_of(a), torch.ones(1, 3, dtype=torch.float64), max_iterations=5)
    assert solution.outcome.tolist() == [Outcome.NEGATIVE_CURVATURE]
    assert solution.iterations.tolist() == [0]
    assert (solution.value == 0).all()


@pytest.mark.parametrize("seed", range(100))
def test_indefinite_systems_are_reported_before_they_climb(seed):
    """A full budget always meets the negative part, and the iterate kept lowers the quadratic model below its start."""
    a = symmetric(torch.linspace(-0.5, 4.0, 10, dtype=torch.float64), seed)[None]
    b = torch.randn(1, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + seed))
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=20)
    assert solution.outcome.tolist() == [Outcome.NEGATIVE_CURVATURE]
    x = solution.value
    assert float(0.5 * x @ a[0] @ x.T - b @ x.T) <= 0.0
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("seed", range(100))
def test_no_false_alarm_on_positive_definite_systems(seed):
    a, b = spd(1, 10, seed=seed), torch.ones(1, 10, dtype=torch.float64)
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=30, rtol=1e-10)
    assert solution.outcome.tolist() == [Outcome.CONVERGED]


def test_float32_reports_no_false_negative_curvature_and_survives_steps_past_convergence():
    a = torch.stack([symmetric(torch.logspace(-4, 3, 30, dtype=torch.float64), s) for s in range(20)])
    b = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    single = conjugate_gradient(matvec_of(a.float()), b.float(), max_iterations=200)
    assert not (single.outcome == Outcome.NON_FINITE).any()
    assert not (single.outcome == Outcome.NEGATIVE_CURVATURE).any()
    assert single.value.isfinite().all()
    low = symmetric(torch.cat([torch.zeros(25, dtype=torch.float64), torch.linspace(1, 50, 5, dtype=torch.float64)]), 1)
    damped = (low + 0.1 * torch.eye(30, dtype=torch.float64))[None]
    double = conjugate_gradient(matvec_of(damped), b[:1], max_iterations=60)
    torch.testing.assert_close(double.value, torch.linalg.solve(damped, b[:1]), rtol=1e-9, atol=1e-9)


def test_tasks_do_not_disturb_each_other(system):
    """A batch of a healthy, an indefinite, a broken and a solved task gives each what it gets alone."""
    healthy, b = system
    a = healthy.clone()
    a[1] = torch.diag(torch.linspace(-2.0, 2.0, SIZE, dtype=torch.float64))
    a[2, 3, 3] = torch.nan
    b = b.clone()
    b[3] = 0
    together = conjugate_gradient(matvec_of(a), b, max_iterations=6, rtol=1e-9)
    for task in range(TASKS):
        alone = conjugate_gradient(matvec_of(a[task : task + 1]), b[task : task + 1], max_iterations=6, rtol=1e-9)
        assert together.outcome[task] == alone.outcome[0]
        assert together.iterations[task] == alone.iterations[0]
        torch.testing.assert_close(together.value[task], alone.value[0], rtol=1e-11, atol=1e-12)
    assert together.outcome[2] == Outcome.NON_FINITE
    assert together.value.isfinite().all()


def test_non_finite_right_hand_side_is_an_outcome(system):
    a, b = system
    b = b.clone()
    b[0, 0] = torch.inf
    solution = conjugate_gradient(matvec_of(a), b, max_iterations=3)
    assert solution.outcome[0] == Outcome.NON_FINITE
    assert (solution.outcome[1:] == Outcome.MAX_ITERATIONS).all()


@pytest.mark.parametrize(
    "wrong", [{"max_iterations": 0}, {"max_iterations": 1, "rtol": -1.0}, {"max_iterations": 1, "atol": -1.0}]
)
def test_misuse_is_refused(system, wrong):
    a, b = system
    with pytest.raises(ValueError, match=r"max_iterations|tolerances"):
        conjugate_gradient(matvec_of(a), b, **wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [10.0, 1e4, 1e8])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_residual_is_the_true_one_whether_it_took_a_product_or_not(dtype, condition, steps):
    """Products are taken in float64 and rounded, so that the truth here is the iterate's, not that of a noisy product."""
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), 20, dtype=torch.float64)
    a = torch.stack([symmetric(spectrum, seed) for seed in range(3)])
    b = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    products = []

    def matvec(v):
        products.append(1)
        return matvec_of(a)(v.double()).to(dtype)

    found = conjugate_gradient(matvec, b.to(dtype), max_iterations=steps)
    rounded = b.to(dtype).double()
    true = (rounded - matvec_of(a)(found.value.double())).norm(dim=-1) / rounded.norm(dim=-1)
    digits = 1e-6 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found.residual.double(), true, rtol=digits, atol=4 * torch.finfo(dtype).eps)
    taken = int(found.iterations.max())
    assert len(products) in (taken, taken + 1)
    if steps == 5 and condition == 10.0:
        assert len(products) == taken == steps  # far from the last digits none is spent on the residual
    if steps == 40 and condition == 10.0:
        assert len(products) == taken + 1


@pytest.mark.parametrize("steps", [6, 12])
def test_with_products_coarser_than_the_type_the_residual_is_the_true_one(steps):
    a = spd(3, 20, seed=7).bfloat16()
    b = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))

    def coarse(v):  # factors in bfloat16, results in float32, as under autocast
        return matvec_of(a.float())(v.bfloat16().float())

    found = conjugate_gradient(coarse, b, max_iterations=steps, precision=torch.finfo(torch.bfloat16).eps)
    true = relative_residual(coarse, b, found.value)
    torch.testing.assert_close(found.residual, true, rtol=1e-5, atol=0)
    believed = conjugate_gradient(coarse, b, max_iterations=steps)
    assert torch.equal(believed.value, found.value)
    assert ((believed.residual - true).abs() > 0.02 * true).any(), "the recurrence's own is not"


def test_products_as_fine_as_the_type_cost_none_for_the_residual(system):
    a, b = system
    fine = {"precision": torch.finfo(b.dtype).eps}
    products = []
    conjugate_gradient(lambda v: products.append(1) or matvec_of(a)(v), b, max_iterations=3, **fine)
    assert len(products) == 3


def test_a_task_near_its_last_digits_does_not_change_what_another_reports():
    easy, hard = torch.eye(8, dtype=torch.float64), spd(1, 8, seed=4)[0]
    b = torch.ones(2, 8, dtype=torch.float64)
    together = conjugate_gradient(matvec_of(torch.stack([easy, hard])), b, max_iterations=3)
    alone = conjugate_gradient(matvec_of(hard[None]), b[1:], max_iterations=3)
    assert torch.equal(together.residual[1], alone.residual[0])
    assert together.residual[0] == 0
