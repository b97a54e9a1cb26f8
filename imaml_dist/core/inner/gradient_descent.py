"""Plain gradient descent on the proximal inner problem, also with a rate of its own for every parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imaml_dist.core.curvature import Objective
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.rule import Rate, State, refuse_bad_rate
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.proximal.protocol import Proximal


@dataclass(frozen=True)
class GradientDescentRule:
    """`update = lr * gradient`.

    Args:
        lr: step size. As a tensor `[P]` or `[T, P]` it is Meta-SGD's learned rate, `phi <- phi - alpha o grad`, whose
            entries may have either sign.

    Raises:
        ValueError: `lr` is a number that is not positive and finite.

    Source: Finn et al. (2017) eq. 1; Li et al., "Meta-SGD" (2017) eq. 3.
    """

    lr: Rate

    def __post_init__(self) -> None:
        refuse_bad_rate(self.lr)

    def start(self, phi: Tensor) -> State:
        """Nothing to remember."""
        return ()

    def update(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """`lr * gradient`, `[T, P]`."""
        return self.lr * gradient, state


def gradient_descent(
    objective: Objective,
    anchor: Tensor,
    *,
    lr: Rate,
    steps: int,
    proximal: Proximal | None = None,
    tolerance: float = 0.0,
) -> InnerSolution:
    """`steps` steps of `phi <- phi - lr (grad L(phi) + Lambda (phi - theta))`, from phi = theta.

    Args:
        objective: support loss, `[T, P] -> [T]`.
        anchor: theta, `[T, P]`; both the start and the proximal centre.
        lr: step size > 0. On a quadratic with Hessian H it converges for `lr < 2 / max eig(H + Lambda)`.
        steps: number of steps >= 0.
        proximal: the regulariser R; None leaves it out (MAML's inner loop).
        tolerance: in [0, 1); tasks stop at `||grad G(phi)|| <= tolerance ||grad G(theta)||`, 0 for the step count alone.

    Returns:
        InnerSolution.

    Raises:
        ValueError: an argument outside its range.

    Source: iMAML algorithm 2, eq. 3-4.
    """
    return descend(objective, anchor, GradientDescentRule(lr), steps=steps, proximal=proximal, tolerance=tolerance)
