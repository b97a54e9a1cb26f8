"""Numbers that change while a run goes on: pure functions of the updates done and of what a checkpoint holds.

So a resumed run goes on with the same numbers, and every worker has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imaml_dist.config.schedule import AdaptConfig, ScheduleConfig


def scheduled(first: float, schedule: ScheduleConfig | None, updates: int) -> float:
    """The value of the update that follows `updates` applied ones.

    With p the share of `schedule.updates` done, at most 1: linear `first + p (to - first)`; cosine
    `first + (to - first)(1 - cos(pi p)) / 2`; step as linear, with p rounded down to a multiple of `1 / stages`.

    Args:
        first: value at 0 updates.
        schedule: of the configuration; None is constant.
        updates: applied so far, >= 0.
    """
    if schedule is None or schedule.to is None:
        return first
    if updates >= schedule.updates:
        return schedule.to
    if schedule.kind == "cosine":
        return first + (schedule.to - first) * 0.5 * (1.0 - math.cos(math.pi * updates / schedule.updates))
    if schedule.kind == "step":
        return first + (schedule.to - first) * (updates * schedule.stages // schedule.updates) / schedule.stages
    return first + (schedule.to - first) * updates / schedule.updates


@dataclass(frozen=True)
class ResidualCap:
    """A cap on the iterations of the linear solver, and the residuals that will move it.

    Attributes:
        cap: iterations at most, for now.
        total, counted: sum and number of the residuals since it was looked at last.
    """

    cap: int
    total: float = 0.0
    counted: int = 0

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> ResidualCap:
        """As it was saved.

        Raises:
            KeyError, TypeError, ValueError: it was not.
        """
        return ResidualCap(int(saved["cap"]), float(saved["total"]), int(saved["counted"]))

    def after(self, residual: float, adapt: AdaptConfig) -> ResidualCap:
        """The cap after one more update.

        Args:
            residual: mean over the accepted tasks of the update; one that is not finite is left out.
            adapt: of the configuration.
        """
        if not math.isfinite(residual):
            return self
        seen = replace(self, total=self.total + residual, counted=self.counted + 1)
        if seen.counted < adapt.every:
            return seen
        mean = seen.total / seen.counted
        move = 1 if mean > adapt.residual else -1 if mean < adapt.residual / 2 else 0
        return ResidualCap(min(adapt.most, max(adapt.fewest, self.cap + move)))
