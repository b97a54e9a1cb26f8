"""Dense systems with a known spectrum, in float64."""

import torch
from torch import Tensor


def matvec_of(a: Tensor):
    """The operator of dense matrices `[T, P, P]`."""
    return lambda v: torch.einsum("tij,tj->ti", a, v)


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    """A dense symmetric matrix with the given spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * eigenvalues) @ q.T


def spd(tasks: int, size: int, seed: int) -> Tensor:
    """`[T, P, P]` symmetric positive definite, condition number 100."""
    spectrum = torch.logspace(-1, 1, size, dtype=torch.float64)
    return torch.stack([symmetric(spectrum, seed * 1000 + t) for t in range(tasks)])
