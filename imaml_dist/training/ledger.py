"""The ledger: which (step, task) have been committed.

Committed steps are consecutive from 0 and each holds all of its tasks, so two counts tell which they are. A running
sha256 over every task's outcome tells whether two runs committed the same; excluded tasks are listed by name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from imaml_dist.core.outcome import TaskOutcome


@dataclass
class Ledger:
    """Committed tasks so far.

    Attributes:
        steps: committed meta-steps; exactly the steps 0 .. steps - 1.
        tasks: committed tasks, excluded ones included.
        excluded: `[step, task, code]` of every excluded task.
        digest: sha256 in hex, chained over steps.
    """

    steps: int = 0
    tasks: int = 0
    excluded: list[list[int]] = field(default_factory=list)
    digest: str = "0" * 64

    def commit(self, step: int, outcomes: list[int]) -> None:
        """Enter a meta-step with the outcome of each task, in task order.

        Raises:
            ValueError: the step is not the next one: something would be lost or done twice.
        """
        if step != self.steps:
            raise ValueError(f"step {step} cannot be committed: the next one is {self.steps}")
        line = f"{self.digest}|{step}|{','.join(map(str, outcomes))}"
        self.digest = hashlib.sha256(line.encode()).hexdigest()
        self.steps += 1
        self.tasks += len(outcomes)
        self.excluded += [[step, task, code] for task, code in enumerate(outcomes) if code != TaskOutcome.OK]

    def outcomes_of_last(self, steps: int) -> dict[str, int]:
        """How many tasks of the last `steps` committed meta-steps ended in which way; all steps hold equally many."""
        codes = [TaskOutcome(code) for step, _, code in self.excluded if step >= self.steps - steps]
        accepted = self.tasks // self.steps * steps - len(codes) if self.steps else 0
        counts = Counter(codes) + Counter({TaskOutcome.OK: accepted})
        return {code.name: counts[code] for code in sorted(counts)}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"steps": self.steps, "tasks": self.tasks, "excluded": list(self.excluded), "digest": self.digest}
