"""What every inner solver returns, and the stationarity that tells how well the inner problem was solved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec


@dataclass(frozen=True)
class InnerSolution:
    """Adapted parameters of T tasks.

    Attributes:
        params: `[T, P]`, phi; no graph attached.
        loss: `[T]`, support loss at phi, without the proximal term.
        stationarity: `[T]`, `||grad G(phi)|| / ||grad G(theta)||` with `G(phi) = L(phi) + R(phi - theta)`.
            0 at an exact stationary point, where the implicit function theorem holds; 1 is where the solver began.
        steps: `[T]` int64.
        outcome: `[T]` int64, `TaskOutcome` codes.
        curvature: products with the curvature of L at phi where the solver has it at hand, so that the implicit solve need
            not linearise again; None otherwise.
    """

    params: Tensor
    loss: Tensor
    stationarity: Tensor
    steps: Tensor
    outcome: Tensor
    curvature: Matvec | None = None


def stationarity(at_end: Tensor, at_start: Tensor) -> Tensor:
    """Ratio of the gradient norms of G per task, `[T, P], [T, P] -> [T]`; 0 where both are zero."""
    end, start = torch.linalg.vector_norm(at_end, dim=-1), torch.linalg.vector_norm(at_start, dim=-1)
    return torch.where((end == 0) & (start == 0), 0.0, end / start)
