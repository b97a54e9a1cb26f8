"""Meta-gradients of the explicit methods, which differentiate the inner loop itself or ignore it."""

from __future__ import annotations

from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.implicit import MetaGradient, query_gradient


def first_order_meta_gradient(query_loss: Objective, adapted: Tensor) -> MetaGradient:
    """First-order MAML: `g_t = v_t = grad L_query(phi_t)`, as if `d phi / d theta` were the identity.

    Args:
        query_loss: `[T, P] -> [T]`.
        adapted: phi, `[T, P]`.

    Returns:
        MetaGradient without a linear solve.

    Source: Finn et al. (2017) section 5.2; Nichol et al. (2018).
    """
    losses, v = query_gradient(query_loss, adapted)
    return MetaGradient(gradient=v, first_order=v, query_loss=losses, solution=None)
