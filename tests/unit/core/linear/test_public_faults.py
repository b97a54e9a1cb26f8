"""Three faults of conjugate-gradient loops in public use, as update rules, caught by the checks that ours passes.

The rules are written from their description, for one system at a time: a step length from a scaled product beside a residual
from the unscaled one; a direction built from the residual before the update; the iterate before the last one returned.
"""

import pytest
import torch
from helpers.algebra import matvec_of, spd

from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient

SIZE = 8


def ours(a, b, steps, rtol=1e-14, scale=1.0):
    return conjugate_gradient(matvec_of(scale * a[None]), b[None], max_iterations=steps, rtol=rtol).value[0]


def textbook(a, b, steps, rtol=1e-14, scale=1.0):
    return _loop(a, b, steps, rtol, scale)


def mixed_scales(a, b, steps, rtol=1e-14, scale=1.0):
    return _loop(a, b, steps, rtol, scale, residual_scale=1.0)


def stale_direction(a, b, steps, rtol=1e-14, scale=1.0):
    return _loop(a, b, steps, rtol, scale, stale=True)


def previous_iterate(a, b, steps, rtol=1e-14, scale=1.0):
    return _loop(a, b, steps, rtol, scale, previous=True)


def _loop(a, b, steps, rtol, scale, *, residual_scale=None, stale=False, previous=False):
    """Hestenes and Stiefel's rule, with one fault switched on."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        product = a @ p
        step = (r @ r) / (scale * (p @ product))
        following = r - step * (scale if residual_scale is None else residual_scale) * product
        moved = x + step * p
        if following.norm() <= rtol * b.norm():
            return x if previous else moved
        x = moved
        p = (r if stale else following) + (following @ following) / (r @ r) * p
        r = following
    return x


def solves_dense_systems(solve):
    a, b = spd(1, SIZE, seed=3)[0], torch.linspace(-1, 2, SIZE, dtype=torch.float64)
    return float((solve(a, b, SIZE + 2) - torch.linalg.solve(a, b)).norm()) <= 1e-11


def solves_scaled_systems(solve):
    a, b = spd(1, SIZE, seed=3)[0], torch.linspace(-1, 2, SIZE, dtype=torch.float64)
    errors = [(solve(a, b, SIZE + 2, scale=c) * c - torch.linalg.solve(a, b)).norm() for c in (0.5, 1.0, 2.0)]
    return bool(max(errors) <= 1e-11)


def returns_what_converged(solve):
    b = torch.linspace(-1, 2, SIZE, dtype=torch.float64)
    a = spd(1, SIZE, seed=3)[0]
    early = solve(a, b, 50, rtol=1e-3)
    return torch.allclose(solve(torch.eye(SIZE).double(), b, 5), b) and float((b - a @ early).norm() / b.norm()) <= 1e-3


CHECKS = (solves_dense_systems, solves_scaled_systems, returns_what_converged)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("solve", [ours, textbook])
def test_ours_and_the_textbook_pass_every_check(solve, check):
    assert check(solve)


@pytest.mark.parametrize(
    ("solve", "check"),
    [
        (mixed_scales, solves_scaled_systems),
        (stale_direction, solves_dense_systems),
        (previous_iterate, returns_what_converged),
    ],
)
def test_each_fault_is_caught(solve, check):
    assert not check(solve)


def test_each_fault_hides_from_some_check():
    """A check alone would not do: the scaled product is right at scale 1."""
    assert solves_dense_systems(mixed_scales)
