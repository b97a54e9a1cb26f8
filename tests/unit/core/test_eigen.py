"""Eigenvalues of small symmetric matrices, where the library's own routine gives up."""

import pytest
import torch
from helpers.algebra import symmetric

from imaml_dist.core.eigen import eigh


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_they_are_those_that_the_matrix_was_made_of(size):
    spectrum = torch.tensor([-3.0, -1e-2, 0.5, 2.0], dtype=torch.float64)
    s = torch.stack([symmetric(size * spectrum, seed) for seed in range(3)])
    d, v = eigh(s)
    torch.testing.assert_close(d, (size * spectrum).expand(3, -1), rtol=1e-12, atol=0)
    torch.testing.assert_close(v @ torch.diag_embed(d) @ v.mT, s, rtol=1e-12, atol=1e-14 * size)


def test_numbers_at_the_end_of_the_range_spoil_nothing():
    torch.manual_seed(0)
    s = torch.diag_embed(torch.tensor([[0.25, 0.25, 0.0, 0.0, 1e-9, 0.0]])).repeat(4, 1, 1)
    tiny = 1e-41 * torch.rand(4, 6, 6)
    d, _ = eigh(s + tiny + tiny.mT)
    torch.testing.assert_close(d, torch.tensor([0.0, 0.0, 0.0, 1e-9, 0.25, 0.25]).expand(4, -1), rtol=1e-5, atol=1e-13)


def test_one_that_is_not_finite_is_nan_and_alone():
    s = torch.eye(3).repeat(3, 1, 1)
    s[1, 0, 0], s[2] = torch.nan, 0.0
    d, _ = eigh(s)
    assert d[1].isnan().all()
    assert d[[0, 2]].tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
