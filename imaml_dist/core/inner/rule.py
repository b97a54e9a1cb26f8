"""What an update rule is: gradients in, updates out, in torch operations alone, so that one can differentiate through it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

State = tuple[Tensor, ...]
"""What a rule remembers of the steps before, tensors with the task axis in front; empty where it remembers nothing."""

Rate = float | Tensor
"""A step size: a number > 0, or a tensor that broadcasts against `[T, P]`: one entry, `[P]`, `[T, 1]` or `[T, P]`."""


class Rule(Protocol):
    """An update rule. Row t of the update depends on row t of the gradients only."""

    def start(self, phi: Tensor) -> State:
        """The state before the first step, for parameters `[T, P]`."""
        ...

    def update(self, gradient: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """`(update, next state)` for step 0, 1, ...; the caller sets `phi <- phi - update`, both `[T, P]`."""
        ...


def refuse_bad_rate(lr: Rate) -> None:
    """Raise ValueError for a number that is not a step size; the entries of tensors are not looked at."""
    if not isinstance(lr, Tensor) and not 0.0 < lr < float("inf"):
        raise ValueError(f"need 0 < lr < inf, got lr={lr}")
