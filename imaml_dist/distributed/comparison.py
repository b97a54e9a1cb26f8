"""The comparison of all ranks' states: what each notes and tells, and what follows from what all have told.

Every meta-step all tell their courses (`agreement`). Before anything is written that lasts, and every now and then, all copy
their states and compare the copies: what is written, and gone back to, is a copy that all agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from imaml_dist.distributed.agreement import Course, checksum, first_to_leave, minority
from imaml_dist.distributed.memory import Memory
from imaml_dist.errors import DisagreementError, TrainingError
from imaml_dist.training.state import MetaState

COLUMNS = 3
"""Numbers that a rank tells."""

NOTHING_DOUBTED, NEVER_LEFT = -2, -1
"""In place of a step."""


class Comparison:
    """One rank's part in it.

    Args:
        rank: this one.
        state: the meta-state, begun, of which all ranks have seen that it is the same.
        memory: copies the state.
        doubted: a course that this rank had taken, of which it is to be found out whether it was right.

    Attributes:
        doubted: the same, until that is known; None if it did not begin here.
        last_agreed: what to go back to; None while all is well.
    """

    def __init__(self, rank: int, state: MetaState, memory: Callable[[], Memory], doubted: Course | None) -> None:
        self._rank, self._state, self._memory = rank, state, memory
        self.doubted = doubted if doubted is not None and doubted.step == state.step else None
        self.last_agreed: Memory | None = None
        self.begin(memory())

    def begin(self, agreed: Memory) -> None:
        """All agree on this copy of the state as it is."""
        self._course, self._agreed = Course(self._state.step), agreed

    def note(self) -> None:
        """The state is as it will be stepped."""
        self._course.sums.append(_checksum(self._state.living_tensors()))

    def copy(self) -> Memory:
        """Copy the state, and note the copy: to be told next."""
        copied = self._memory()
        self._course.sums.append(_checksum(copied.tensors))
        return copied

    def told(self) -> list[int]:
        """This rank's columns: its course in two numbers of 32 bits, and where a doubted one left it."""
        folded, left = self._course.fold(), NOTHING_DOUBTED
        if self.doubted is not None and len(self.doubted.sums) <= len(self._course.sums):
            found = self.doubted.left_at(self._course)
            left, self.doubted = NEVER_LEFT if found is None else found, None
        return [folded >> 32, folded % 2**32, left]

    def judge(self, rows: Sequence[Sequence[float]]) -> None:
        """Draw the conclusions from what all ranks, in their order, have told.

        Raises:
            DisagreementError: they do not agree, or a rank was at fault when they had not.
            TrainingError: they do not agree once more.
        """
        courses = [(row[0], row[1]) for row in rows]
        steps = [int(row[2]) for row in rows]
        doubts = any(step != NOTHING_DOUBTED for step in steps)
        if len(set(courses)) > 1:
            self._disagree([courses.index(course) for course in courses], doubts)
        faulty = first_to_leave([step if step >= 0 else None for step in steps])
        if doubts and 0 < len(faulty) < len(rows):
            raise DisagreementError(
                f"rank {faulty[0]}'s parameters went wrong in step {steps[faulty[0]]}", self._rank in faulty
            )

    def _disagree(self, courses: list[int], again: bool) -> None:
        step, begun = self._state.step, self._course.step
        if again:
            raise TrainingError(
                f"the workers hold different parameters at step {step}, and did so the first time that they came from step {begun}; they "
                "do not run on one kind of machine, or one of the machines is broken"
            )
        faulty = minority(courses)
        # The line of metrics of the step before is written: rank 0 has come further since.
        self.last_agreed = replace(self._agreed, record=None, doubted=self._course if faulty is None else None)
        who = "the workers'" if faulty is None else f"rank {', '.join(map(str, faulty))}'s"
        raise DisagreementError(
            f"{who} parameters differ at step {step}; all go back to step {begun}", self._rank in (faulty or ())
        )


def _checksum(tensors: dict[str, Tensor]) -> int:
    return checksum(tensor for _, tensor in sorted(tensors.items()))
