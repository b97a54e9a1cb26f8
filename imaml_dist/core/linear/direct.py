"""The dense solve: ground truth for models of a few thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_dist.core.curvature import Matvec
from imaml_dist.core.linear.solution import LinearSolution, Outcome, relative_residual


def direct(matvec: Matvec, b: Tensor, *, max_size: int = 4096) -> LinearSolution:
    """Form every task's matrix by P products with unit vectors and solve it by LU; indefinite systems too.

    Args:
        matvec: `[T, P] -> [T, P]`, linear and symmetric, row t depending on row t only.
        b: `[T, P]`.
        max_size: largest P accepted.

    Returns:
        LinearSolution with `iterations` P. There is no tolerance: CONVERGED says that the elimination went through, `residual` how
        well. NON_FINITE with a zero `value` where the matrix is singular or not finite.

    Raises:
        ValueError: P > `max_size`; the message says what the matrices would take.

    Source: LU with partial pivoting, Golub and Van Loan, "Matrix computations" (2013), section 3.4.
    """
    tasks, size = b.shape
    if size > max_size:
        memory = tasks * size * size * b.element_size() / 2**30
        raise ValueError(
            f"a dense solve of {tasks} tasks with {size} parameters takes {memory:.1f} GiB, more than max_size = {max_size} "
            "parameters allow; use an iterative solver"
        )
    identity = torch.eye(size, dtype=b.dtype, device=b.device)
    matrix = torch.stack([matvec(identity[i].expand_as(b)) for i in range(size)], dim=-1)
    usable = matrix.isfinite().flatten(1).all(-1) & b.isfinite().all(-1)
    # The others must not suffer from a task whose matrix is not finite.
    safe = torch.where(usable[:, None, None], 0.5 * (matrix + matrix.mT), identity)
    x, info = torch.linalg.solve_ex(safe, torch.where(usable[:, None], b, 0.0).unsqueeze(-1))
    x = x.squeeze(-1)
    solved = usable & (info == 0) & x.isfinite().all(-1)
    x = torch.where(solved[:, None], x, 0.0)
    outcome = torch.where(solved, int(Outcome.CONVERGED), int(Outcome.NON_FINITE))
    return LinearSolution(x, outcome, torch.full_like(outcome, size), relative_residual(matvec, b, x))
