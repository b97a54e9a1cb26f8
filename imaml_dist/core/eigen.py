"""Eigenvalues of batches of small symmetric matrices, whatever the size of their entries."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(s: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[B, m]`, ascending, and eigenvectors `[B, m, m]` of symmetric `[B, m, m]`; nan eigenvalues where s is not finite.

    A matrix is decomposed in units of its largest entry, without entries below `eps^2` of it: the library's routine returns nan
    for finite matrices that hold numbers at the end of the type's range, and raises for one that is not finite, whatever the
    others are.
    """
    finite = s.isfinite().flatten(1).all(-1)
    s = torch.where(finite[:, None, None], s, 0.0)
    largest = s.abs().amax((1, 2))
    size = torch.where(largest > 0, largest, 1.0)
    scaled = s / size[:, None, None]
    scaled = torch.where(scaled.abs() > torch.finfo(s.dtype).eps ** 2, scaled, 0.0)
    d, v = torch.linalg.eigh(scaled)
    return torch.where(finite[:, None], d * size[:, None], torch.nan), v
