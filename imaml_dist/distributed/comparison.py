"""The comparison of all ranks' states, every now and then: what each notes and tells, and what follows from what all have told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from imaml_dist.config.schema import RunConfig
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
        run: tells when to compare.
        rank: this one.
        state: the meta-state, begun.
        memory: of the state as it is now.
        doubted: a course from here that this rank had taken, of which it is to be found out whether it was right.
    """

    def __init__(
        self, run: RunConfig, rank: int, state: MetaState, memory: Callable[[], Memory], doubted: Course | None
    ) -> None:
        self._run, self._rank, self._state, self._memory = run, rank, state, memory
        self.doubted = doubted
        self.begin()
        self.last_agreed: Memory | None = None
        """What to go back to; None while all is well."""

    def begin(self) -> None:
        """All agree on the state as it is."""
        self._course, self._agreed = Course(self._state.step), self._memory()

    def note(self) -> None:
        """The state is as it will be stepped."""
        self._course.sums.append(checksum(self._state.living_tensors()))

    @property
    def due(self) -> bool:
        """Whether to compare now: also before what is written is the run's result."""
        step, run = self._state.step, self._run
        return bool(self._course.sums) and (
            step % run.compare_every == 0 or step % run.checkpoint_every == 0 or step >= run.steps
        )

    def told(self) -> list[int]:
        """This rank's columns: its course in two numbers of 32 bits, and where a doubted one left it."""
        if not self.due:
            return [0, 0, NOTHING_DOUBTED]
        self.note()
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
