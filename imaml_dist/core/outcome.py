"""How one task of a meta-step ended. Everything but OK is excluded before the reduction, coded and counted."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class TaskOutcome(IntEnum):
    """Per-task code; a task that is not OK adds nothing to the meta-gradient and does not count in its mean."""

    OK = 0
    NON_FINITE = 1
    """A loss or gradient of the task was not finite."""
    INNER_DIVERGED = 2
    """The inner solver ended far above where it began (`DIVERGENCE_FACTOR`)."""
    BAD_EPISODE = 3
    """The episode's data could not be used."""
    OUT_OF_MEMORY = 4
    """The task did not fit into the device's memory."""
    SOLVE_FAILED = 5
    """The linear solve met negative curvature and the run says `on_negative_curvature: exclude`."""


DIVERGENCE_FACTOR = 10.0
"""An inner solve diverged when its objective rose above this multiple of its starting value (plus as much again)."""


def all_finite(x: Tensor) -> Tensor:
    """Which rows of `[T, P]` hold finite numbers only, `[T]` bool.

    A sum keeps every nan and infinity, and costs a fraction of looking at each number. A row whose sum itself leaves the
    range of its type counts as not finite.
    """
    return x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()


def inner_outcome(start: Tensor, end: Tensor) -> Tensor:
    """`TaskOutcome` codes `[T]` of inner solves from their objective at the start and at the end, both `[T]`."""
    diverged = end > DIVERGENCE_FACTOR * (1.0 + start.abs())
    code = torch.where(diverged, int(TaskOutcome.INNER_DIVERGED), int(TaskOutcome.OK))
    return torch.where(start.isfinite() & end.isfinite(), code, int(TaskOutcome.NON_FINITE))
