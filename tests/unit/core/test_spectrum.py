"""Ritz values against dense eigenvalues: where they must agree, what they can never do, and what a broken task changes."""

import pytest
import torch
from helpers.algebra import matvec_of, spd, symmetric

from imaml_dist.core.spectrum import lanczos


def _draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _stacked(*spectra):
    return torch.stack([symmetric(torch.as_tensor(s, dtype=torch.float64), seed) for seed, s in enumerate(spectra)])


INDEFINITE = torch.linspace(-3, 40, 30)
CLUSTERED = torch.cat([torch.full((14,), 1.0), torch.full((14,), 1.0 + 1e-9), torch.tensor([-0.5, 90.0])])
LOW_RANK = torch.cat([torch.zeros(26), torch.tensor([0.3, 2.0, 5.0, 700.0])])


@pytest.mark.parametrize("matrices", [spd(3, 30, seed=1), _stacked(INDEFINITE, CLUSTERED, LOW_RANK)])
def test_as_many_steps_as_dimensions_give_the_extreme_eigenvalues(matrices):
    found = lanczos(matvec_of(matrices), _draw(3, 30), 30)
    dense = torch.linalg.eigvalsh(matrices)
    size = dense.abs().amax(1)
    assert ((found.smallest - dense[:, 0]).abs() <= 1e-12 * size).all()
    assert ((found.largest - dense[:, -1]).abs() <= 1e-12 * size).all()
    assert (found.smallest_bound <= 1e-8 * size).all() and (found.largest_bound <= 1e-8 * size).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_ritz_values_stay_inside_the_spectrum_and_an_eigenvalue_lies_within_each_bound(steps):
    matrices = _stacked(torch.linspace(-3, 40, 100), torch.logspace(-2, 3, 100), torch.linspace(1, 2, 100))
    found = lanczos(matvec_of(matrices), _draw(3, 100), steps)
    dense = torch.linalg.eigvalsh(matrices)
    slack = 1e-11 * dense.abs().amax(1)
    assert (found.steps == steps).all()
    assert (found.smallest >= dense[:, 0] - slack).all() and (found.largest <= dense[:, -1] + slack).all()
    for value, bound in ((found.smallest, found.smallest_bound), (found.largest, found.largest_bound)):
        assert ((dense - value[:, None]).abs().amin(1) <= bound + slack).all()


def test_fifty_steps_find_the_ends_of_a_few_shot_systems_spectrum():
    """A shift, twenty large eigenvalues and a few negative ones among many near zero, as of `H + lambda I` at five images."""
    spectrum = torch.cat([_draw(2000, seed=3).abs() * 1e-3, torch.logspace(0, 3, 20), torch.tensor([-0.3, -0.7])]) + 0.1
    rotated = spectrum.to(torch.float64)  # Lanczos sees the same in every basis: random weights on the eigenvectors

    found = lanczos(lambda v: rotated * v, _draw(1, len(rotated)), 50)
    assert float(found.smallest) == pytest.approx(float(rotated.min()), rel=1e-6)
    assert float(found.largest) == pytest.approx(float(rotated.max()), rel=1e-9)


def test_a_positive_ritz_value_is_no_positive_definite_operator():
    """Two negative eigenvalues among twenty thousand that fifty steps do not see: the bound tells that they cannot."""
    spectrum = torch.cat([torch.logspace(-2, 3, 20000, dtype=torch.float64), torch.tensor([-0.3, -0.1])])
    found = lanczos(lambda v: spectrum * v, _draw(1, len(spectrum)), 50)
    assert 0 < float(found.smallest) < float(found.smallest_bound)
    assert not bool(found.positive) and not bool(found.not_positive)


def test_what_is_decided_is_decided_beyond_rounding_alone():
    matrices = _stacked(torch.linspace(0.1, 40, 30), INDEFINITE, LOW_RANK)
    matrices = torch.cat([matrices, torch.full((1, 30, 30), torch.nan)])
    found = lanczos(matvec_of(matrices), _draw(4, 30), 30)
    assert found.positive.tolist() == [True, False, False, False]
    assert found.not_positive.tolist() == [False, True, False, False]
    assert 0 <= float(found.smallest[2].abs()) <= float(found.rounding[2]) < 1e-10


def test_an_invariant_space_ends_it_early():
    spectra = (torch.cat([torch.full((25,), 2.0), torch.tensor([-1.0, 9.0])]), torch.full((27,), 3.0))
    found = lanczos(matvec_of(_stacked(*spectra)), _draw(2, 27), 20)
    assert found.steps.tolist() == [3, 1]
    assert torch.allclose(found.smallest, torch.tensor([-1.0, 3.0], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(found.largest, torch.tensor([9.0, 3.0], dtype=torch.float64), rtol=1e-12)
    assert (found.smallest_bound < 1e-12).all() and (found.largest_bound < 1e-12).all()
    zero = lanczos(torch.zeros_like, _draw(2, 5), 5)
    assert (zero.steps == 1).all() and (zero.smallest == 0).all() and (zero.largest == 0).all()


def test_an_eigenvector_to_start_from_is_a_space_of_its_own():
    values, vectors = torch.linalg.eigh(spd(1, 12, seed=2)[0])
    found = lanczos(matvec_of(spd(1, 12, seed=2)), 1e-30 * vectors[:, 4][None], 12)
    assert (int(found.steps), float(found.smallest)) == (1, pytest.approx(float(values[4]), rel=1e-12))


def test_tasks_together_are_tasks_alone():
    matrices, start = _stacked(INDEFINITE, CLUSTERED, LOW_RANK), _draw(3, 30)
    together = lanczos(matvec_of(matrices), start, 12)
    for t in range(3):
        alone = lanczos(matvec_of(matrices[t : t + 1]), start[t : t + 1], 12)
        for name in ("smallest", "largest", "smallest_bound", "largest_bound", "steps"):
            assert torch.allclose(getattr(together, name)[t], getattr(alone, name)[0], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("bad", ["matrix", "start", "later", "zero"])
def test_a_broken_task_is_nan_and_changes_no_bit_of_the_others(bad):
    matrices, start = spd(3, 30, seed=1), _draw(3, 30)
    good = lanczos(matvec_of(matrices), start, 12)
    products = []

    def broken(v):
        products.append(None)
        w = matvec_of(matrices)(v)
        w[1] *= torch.inf if bad == "matrix" or (bad == "later" and len(products) == 4) else 1.0
        return w

    if bad in ("start", "zero"):
        start[1] = 0.0 if bad == "zero" else torch.nan
    found = lanczos(broken, start, 12)
    assert found.smallest[1].isnan() and found.largest[1].isnan() and found.smallest_bound[1].isnan()
    assert found.steps.tolist() == [12, {"later": 3}.get(bad, 0), 12]
    for name in ("smallest", "largest", "smallest_bound", "largest_bound"):
        assert torch.equal(getattr(found, name)[::2], getattr(good, name)[::2]), name


def test_float32_agrees_to_its_own_precision():
    matrices = _stacked(INDEFINITE, CLUSTERED)
    found = lanczos(matvec_of(matrices.float()), _draw(2, 30).float(), 30)
    dense = torch.linalg.eigvalsh(matrices)
    assert found.smallest.dtype == torch.float32
    assert torch.allclose(found.smallest.double(), dense[:, 0], atol=1e-4 * 90)
    assert torch.allclose(found.largest.double(), dense[:, -1], rtol=1e-5)


def test_what_cannot_be_done_is_refused():
    for start, steps in ((_draw(2, 3), 0), (_draw(3), 2)):
        with pytest.raises(ValueError, match="need steps >= 1 and start"):
            lanczos(lambda v: v, start, steps)
