"""What every linear solver promises: the solution of dense algebra, the true residual, and tasks that do not disturb each other."""

import itertools
from functools import partial

import pytest
import torch
from helpers.algebra import matvec_of, spd, symmetric

from imaml_dist.algorithms.linear import ConjugateGradient
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.direct import direct
from imaml_dist.core.linear.minres import minres
from imaml_dist.core.linear.neumann import neumann
from imaml_dist.core.linear.nystrom import low_rank_curvature, nystrom, nystrom_preconditioner
from imaml_dist.core.linear.solution import SLACK, Outcome, relative_residual, unit
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.diagonal import DiagonalProximal
from imaml_dist.core.proximal.scalar import ScalarProximal

TASKS, SIZE, STRENGTH = 5, 8, 0.3
ITERATIVE = {"conjugate_gradient": conjugate_gradient, "minres": minres, "neumann": neumann}
SOLVERS = {
    "conjugate_gradient": partial(conjugate_gradient, max_iterations=40, rtol=1e-13),
    "minres": partial(minres, max_iterations=40, rtol=1e-13),
    "neumann": partial(neumann, max_iterations=6000, rtol=1e-13),
    "nystrom": partial(nystrom, rank=SIZE, rtol=1e-10),
    "direct": direct,
}
IDENTITY = torch.eye(SIZE, dtype=torch.float64)


def right_side(seed=2, tasks=TASKS):
    return torch.randn(tasks, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def system_of(a):
    """`a` as curvature plus regulariser."""
    return ProximalSystem(matvec_of(a - STRENGTH * IDENTITY), ScalarProximal(STRENGTH))


def recomputed(a, b, x):
    return (b - torch.einsum("tij,tj->ti", a, x)).norm(dim=1) / b.norm(dim=1)


@pytest.mark.parametrize("name", SOLVERS)
def test_solution_is_that_of_dense_algebra_and_the_residual_is_true(name):
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    solution = SOLVERS[name](system_of(a), b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-10)
    assert (solution.outcome == Outcome.CONVERGED).all()
    assert (solution.residual - recomputed(a, b, solution.value)).abs().max() < 1e-6
    assert (solution.residual < 1e-9).all()


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_budget_that_ends_first_says_so_with_the_true_residual(name, steps):
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    solution = ITERATIVE[name](matvec_of(a), b, max_iterations=steps)
    assert (solution.outcome == Outcome.MAX_ITERATIONS).all()
    assert (solution.iterations == steps).all()
    assert (solution.residual - recomputed(a, b, solution.value)).abs().max() < 1e-12
    assert (solution.residual > 1e-3).all()


@pytest.mark.parametrize("name", ITERATIVE)
def test_each_task_ends_as_soon_as_it_is_good_enough(name):
    a = torch.stack([torch.eye(SIZE, dtype=torch.float64) * 2, *spd(2, SIZE, seed=4)])
    b = right_side(tasks=3)
    loose, tight = (ITERATIVE[name](matvec_of(a), b, max_iterations=5000, rtol=rtol) for rtol in (0.3, 1e-9))
    assert (loose.outcome == Outcome.CONVERGED).all() and (tight.outcome == Outcome.CONVERGED).all()
    assert (loose.residual <= 0.3 * (1 + 1e-9)).all() and (tight.residual <= 1.01e-9).all()
    assert (loose.iterations[1:] < tight.iterations[1:]).all()
    assert int(loose.iterations[0]) == 1, "a multiple of the identity is solved in one step"


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_good_start_saves_steps_and_an_exact_one_needs_none(name):
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    solve, exact = partial(ITERATIVE[name], matvec_of(a), b, max_iterations=5000, rtol=1e-8), torch.linalg.solve(a, b)
    assert (solve(x0=exact).iterations == 0).all()
    assert int(solve(x0=exact + 1e-6 * b).iterations.sum()) < int(solve().iterations.sum())
    torch.testing.assert_close(solve(x0=3 * b).value, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_has_the_solution_zero(name):
    solution = SOLVERS[name](system_of(spd(TASKS, SIZE, seed=1)), torch.zeros(TASKS, SIZE, dtype=torch.float64))
    assert not solution.value.any() and not solution.residual.any()
    assert (solution.outcome == Outcome.CONVERGED).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_broken_task_is_an_outcome_and_leaves_the_others_alone(name):
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    broken = a.clone()
    broken[1, 2, 2], broken[3] = torch.nan, torch.inf
    b[4, 0] = torch.inf
    together = SOLVERS[name](system_of(broken), b)
    assert together.outcome[[1, 3, 4]].tolist() == [Outcome.NON_FINITE] * 3
    assert together.value.isfinite().all()
    for task in (0, 2):
        alone = SOLVERS[name](system_of(a[task : task + 1]), b[task : task + 1])
        assert together.outcome[task] == alone.outcome[0] == Outcome.CONVERGED
        assert together.iterations[task] == alone.iterations[0]
        torch.testing.assert_close(together.value[task], alone.value[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("seed", range(100))
def test_indefinite_systems_are_solved_by_minres_and_flagged_by_conjugate_gradient(seed):
    """Known spectrum: three negative eigenvalues, none near zero."""
    spectrum = torch.tensor([-3.0, -1.5, -0.4, 0.3, 0.7, 1.0, 2.0, 5.0], dtype=torch.float64)
    a, b = symmetric(spectrum, seed)[None], right_side(1000 + seed, tasks=1)
    solution = minres(matvec_of(a), b, max_iterations=40, rtol=1e-12)
    assert solution.outcome.tolist() == [Outcome.CONVERGED]
    assert float((solution.value - torch.linalg.solve(a, b)).norm() / solution.value.norm()) < 1e-8
    assert abs(float(solution.residual - recomputed(a, b, solution.value))) < 1e-6
    flagged = conjugate_gradient(matvec_of(a), b, max_iterations=16)
    assert flagged.outcome.tolist() == [Outcome.NEGATIVE_CURVATURE]
    assert abs(float(flagged.residual - recomputed(a, b, flagged.value))) < 1e-6
    torch.testing.assert_close(direct(matvec_of(a), b).value, torch.linalg.solve(a, b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_no_false_alarm_on_positive_definite_systems(seed):
    a, b = spd(1, SIZE, seed=seed), right_side(seed, tasks=1)
    for solve in (conjugate_gradient, minres):
        solution = solve(matvec_of(a), b, max_iterations=30, rtol=1e-10)
        assert solution.outcome.tolist() == [Outcome.CONVERGED]
        assert abs(float(solution.residual - recomputed(a, b, solution.value))) < 1e-6


def test_minres_never_lets_the_residual_grow():
    a, b = symmetric(torch.linspace(-2, 3, SIZE, dtype=torch.float64), 3)[None], right_side(tasks=1)
    residuals = [float(minres(matvec_of(a), b, max_iterations=k).residual) for k in range(1, SIZE + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(residuals))
    assert residuals[-1] < 1e-10


@pytest.mark.parametrize(
    ("name", "condition", "rtol"),
    [
        ("conjugate_gradient", 1e5, 1e-3),
        ("minres", 1e6, 0.1),
        ("minres", 1e4, 1e-3),
        *((n, 100.0, 1e-7) for n in ITERATIVE),
    ],
)
def test_a_recurrence_that_ran_out_of_digits_has_not_converged(name, condition, rtol):
    """Float32, where the recurrence goes on to fall when x does not. The truth is the float64 residual of what was asked."""
    spectrum = torch.logspace(0, torch.tensor(condition).log10().item(), 40, dtype=torch.float64)
    a = torch.stack([symmetric(spectrum, seed) for seed in range(20)]).float()
    b = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    solution = ITERATIVE[name](matvec_of(a), b, max_iterations=400, rtol=rtol)
    true, converged = recomputed(a.double(), b.double(), solution.value.double()), solution.outcome == Outcome.CONVERGED
    assert (converged | (solution.outcome == Outcome.MAX_ITERATIONS)).all()
    # A float32 product that tells is itself wrong by eps times the condition number; half of the slack is room enough.
    assert (true[converged] <= 1.5 * SLACK * rtol).all()
    assert not converged.all()
    assert (true[~converged] > 0.6 * SLACK * rtol).all()
    if name == "minres":
        assert (true <= 1).all(), "never a worse iterate than the start"
        assert torch.equal(solution.unsolved, (solution.value == 0).all(1))
        assert torch.equal(solution.unsolved, (solution.iterations == 0))


def test_minres_keeps_the_start_it_was_given_where_rounding_spoils_the_steps():
    a = torch.stack([symmetric(torch.logspace(0, 6, 40, dtype=torch.float64), s) for s in range(20)]).float()
    b = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    start = 1e-6 * b
    solution = minres(matvec_of(a), b, max_iterations=300, rtol=0.1, x0=start)
    spoiled = solution.unsolved
    assert spoiled.any()
    assert torch.equal(solution.value[spoiled], start[spoiled])
    before, after = (recomputed(a.double(), b.double(), x.double()) for x in (start, solution.value))
    assert (after <= before * (1 + 1e-6)).all()
    torch.testing.assert_close(solution.residual[spoiled].double(), before[spoiled], rtol=1e-6, atol=0)
    assert (solution.outcome[spoiled] == Outcome.MAX_ITERATIONS).all()


@pytest.mark.parametrize("power", [-73, -120])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", ITERATIVE)
def test_a_right_side_whose_squares_vanish_is_solved_to_the_same_bits(name, started, power):
    """`A x = c b` has the solution `c x`; with c a power of two no rounding differs. 2^-73 is 1e-22, whose square float32 lacks."""
    a, b, tiny = spd(TASKS, SIZE, seed=1).float(), right_side().float(), 2.0**power
    starts = [{"x0": 0.3 * b}, {"x0": 0.3 * b * tiny}] if started else [{}, {}]
    plain, scaled = (
        ITERATIVE[name](matvec_of(a), b * c, max_iterations=5, **s) for c, s in zip((1, tiny), starts, strict=True)
    )
    assert torch.equal(scaled.value, plain.value * tiny)
    assert scaled.value.any(1).all()
    assert torch.equal(scaled.outcome, plain.outcome) and torch.equal(scaled.iterations, plain.iterations)
    true = recomputed(a.double(), b.double() * tiny, scaled.value.double())
    torch.testing.assert_close(scaled.residual.double(), true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_residual_of_a_tiny_right_side_is_not_zero(name):
    """A zero for an answer has residual 1, also where `||b||^2` is zero in its type."""
    a, b = spd(TASKS, SIZE, seed=1), right_side() * 1e-200
    solution = SOLVERS[name](system_of(a), b)
    torch.testing.assert_close(solution.value * 1e200, torch.linalg.solve(a, b * 1e200), rtol=1e-9, atol=1e-10)
    assert (solution.outcome == Outcome.CONVERGED).all()
    assert (relative_residual(matvec_of(a), b, torch.zeros_like(b)) == 1).all()


def test_the_unit_of_a_vector_is_a_power_of_two_below_its_largest_entry():
    rows = torch.tensor([[0.3, -0.7], [0.0, 0.0], [3.0, 1e9], [torch.nan, 1e-9], [torch.inf, 0.1], [-3e-45, 1e-45]])
    units = unit(rows)
    assert units.flatten().tolist() == [0.5, 1, 1, 1, 1, 2.0**-148]
    assert torch.equal(rows[5] / units[5], torch.tensor([-1.0, 0.5]))


def test_an_absolute_tolerance_is_in_the_units_of_the_right_side():
    a, b = spd(TASKS, SIZE, seed=1), 1e-5 * right_side()
    for name, solve in ITERATIVE.items():
        solution = solve(matvec_of(a), b, max_iterations=5000, atol=2e-6)
        size = recomputed(a, b, solution.value) * b.norm(dim=1)
        assert (solution.outcome == Outcome.CONVERGED).all(), name
        assert ((size <= 2e-6 * (1 + 1e-9)) & (size > 1e-8)).all(), name
        assert (solve(matvec_of(a), b, max_iterations=5, atol=1.0).iterations == 0).all(), name


def test_minres_takes_a_preconditioner():
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    solution = minres(matvec_of(a), b, max_iterations=5, rtol=1e-10, preconditioner=matvec_of(torch.linalg.inv(a)))
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-9)
    assert (solution.iterations == 1).all()


def test_neumann_is_the_partial_sum_of_its_series():
    a, b, scale = spd(TASKS, SIZE, seed=1), right_side(), 0.15
    solution = neumann(matvec_of(a), b, max_iterations=7, scale=scale)
    step = IDENTITY - scale * a
    expected, term = torch.zeros_like(b), scale * b
    for _ in range(7):
        expected, term = expected + term, torch.einsum("tij,tj->ti", step, term)
    torch.testing.assert_close(solution.value, expected, rtol=1e-12, atol=1e-14)


def test_neumann_guards_itself_against_a_scale_that_diverges():
    a, b = spd(TASKS, SIZE, seed=1), right_side()
    solution = neumann(matvec_of(a), b, max_iterations=6000, scale=3.0, rtol=1e-9)
    assert (solution.outcome == Outcome.CONVERGED).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-7)
    indefinite = symmetric(torch.linspace(-2, 3, SIZE, dtype=torch.float64), 3)[None]
    flagged = neumann(matvec_of(indefinite), b[:1], max_iterations=500)
    assert flagged.outcome.tolist() == [Outcome.NEGATIVE_CURVATURE] and flagged.value.isfinite().all()


def test_nystrom_is_exact_as_soon_as_its_rank_is_that_of_the_curvature():
    low = torch.cat([torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)])
    curvature = torch.stack([symmetric(low, t) for t in range(TASKS)])
    system, b = ProximalSystem(matvec_of(curvature), ScalarProximal(STRENGTH), damping=0.1), right_side()
    exact = torch.linalg.solve(curvature + (STRENGTH + 0.1) * IDENTITY, b)
    for rank, outcome in ((3, Outcome.CONVERGED), (8, Outcome.CONVERGED), (1, Outcome.MAX_ITERATIONS)):
        solution = nystrom(system, b, rank=rank, rtol=1e-8)
        assert (solution.outcome == outcome).all()
        assert bool(((solution.value - exact).norm(dim=1) / exact.norm(dim=1) < 1e-8).all()) == (rank >= 3)
        torch.testing.assert_close(
            solution.residual,
            recomputed(curvature + (STRENGTH + 0.1) * IDENTITY, b, solution.value),
            rtol=1e-6,
            atol=1e-12,
        )
    approximation = low_rank_curvature(matvec_of(curvature), b, rank=3)
    rebuilt = torch.einsum(
        "tpr,tr,tqr->tpq", approximation.columns, 1 / approximation.eigenvalues, approximation.columns
    )
    torch.testing.assert_close(rebuilt, curvature, rtol=1e-9, atol=1e-10)


def test_a_nystrom_preconditioner_saves_conjugate_gradient_its_steps():
    spectrum = torch.cat([torch.full((5,), 1e-3, dtype=torch.float64), torch.tensor([10.0, 300.0, 5000.0]).double()])
    curvature = torch.stack([symmetric(spectrum, t) for t in range(TASKS)])
    system, b = ProximalSystem(matvec_of(curvature), ScalarProximal(STRENGTH)), right_side()
    plain = conjugate_gradient(system, b, max_iterations=50, rtol=1e-8)
    helped = conjugate_gradient(
        system, b, max_iterations=50, rtol=1e-8, preconditioner=nystrom_preconditioner(system, b, rank=4)
    )
    assert (helped.outcome == Outcome.CONVERGED).all()
    assert (helped.iterations < plain.iterations).all()
    torch.testing.assert_close(
        helped.value, torch.linalg.solve(curvature + STRENGTH * IDENTITY, b), rtol=1e-5, atol=1e-6
    )


def test_the_regulariser_leaves_conjugate_gradient_the_curvature_alone():
    """A curvature of rank 2 takes 3 steps, whatever the strengths are; without it they count too. One strength changes no bit."""
    spectrum = torch.tensor([0, 0, 0, 0, 0, 0, 5.0, 40.0], dtype=torch.float64)
    curvature, b = torch.stack([symmetric(spectrum, t) for t in range(TASKS)]), right_side()
    strengths = torch.logspace(-1, 1.5, SIZE, dtype=torch.float64)
    system = ProximalSystem(matvec_of(curvature), DiagonalProximal(strengths))
    exact = torch.linalg.solve(curvature + torch.diag(strengths), b)
    with_it = ConjugateGradient(3).solve(system, b)
    without = ConjugateGradient(3, preconditioner="none").solve(system, b)
    torch.testing.assert_close(with_it.value, exact, rtol=1e-9, atol=1e-11)
    assert (without.residual > 0.01).all()
    alike = ProximalSystem(matvec_of(curvature), ScalarProximal(STRENGTH))
    assert torch.equal(
        ConjugateGradient(3).solve(alike, b).value, ConjugateGradient(3, preconditioner="none").solve(alike, b).value
    )


def test_a_singular_matrix_is_an_outcome_of_the_direct_solve():
    a, b = spd(2, SIZE, seed=1), right_side(tasks=2)
    a[0] = 0
    solution = direct(matvec_of(a), b)
    assert solution.outcome.tolist() == [Outcome.NON_FINITE, Outcome.CONVERGED]
    assert not solution.value[0].any()
    with pytest.raises(ValueError, match="max_size"):
        direct(matvec_of(a), b, max_size=7)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize(
    "wrong", [{"max_iterations": 0}, {"rtol": -1.0}, {"atol": -1.0}, {"x0": torch.zeros(1, 3, dtype=torch.float64)}]
)
def test_misuse_is_refused(name, wrong):
    with pytest.raises(ValueError, match=r"max_iterations|tolerances|x0"):
        ITERATIVE[name](matvec_of(spd(1, SIZE, seed=1)), right_side(tasks=1), **{"max_iterations": 3, **wrong})
