"""Adam, as torch.optim.Adam defines it, with a derivative that is finite everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_dist.core.inner.rule import Rate, State, refuse_bad_rate


@dataclass(frozen=True)
class AdamRule:
    """`update = lr m_hat / (sqrt(v_hat) + eps)` with running means m of the gradients and v of their squares.

    Where every gradient of an entry so far was exactly 0 the update has the derivative `lr (1 - beta1) / (eps c)`, c the
    bias correction of m: finite, and what the formula tends to, but large. It multiplies second derivatives of the loss
    that are 0 too where the entry is unused (a dead unit); where they are not, raise `eps`.

    Args:
        lr: step size.
        beta1: decay of the mean of the gradients, in [0, 1).
        beta2: decay of the mean of their squares, in [0, 1).
        eps: > 0, in units of the gradient.

    Raises:
        ValueError: an argument outside its range.

    Source: Kingma and Ba (2015), algorithm 1; order of the operations as in torch.optim.Adam.
    """

    lr: Rate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        refuse_bad_rate(self.lr)
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0 and self.eps > 0.0):
            raise ValueError(
                f"need 0 <= beta1 < 1, 0 <= beta2 < 1 and eps > 0, got beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}"
            )

    def start(self, phi: Tensor) -> State:
        """Means m and v of 0, `[T, P]` each."""
        return torch.zeros_like(phi), torch.zeros_like(phi)

    def update(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """The update `[T, P]` and the new means."""
        mean, square = state
        mean = self.beta1 * mean + (1.0 - self.beta1) * gradient
        square = self.beta2 * square + (1.0 - self.beta2) * gradient * gradient
        correction1, correction2 = 1.0 - self.beta1 ** (step + 1), 1.0 - self.beta2 ** (step + 1)
        root = _root(square) / correction2**0.5 + self.eps
        return self.lr / correction1 * mean / root, (mean, square)


def _root(square: Tensor) -> Tensor:
    """`sqrt(square)` with derivative 0 at 0, where it multiplies a mean of 0 and the true product vanishes."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
