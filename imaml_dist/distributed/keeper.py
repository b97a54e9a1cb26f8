"""The keeper of one rank: starts its process, watches it, and gives the rank a new process when that one is lost.

Why the process of a rank is not the Ray actor itself: when an actor dies, Ray Train starts the whole group again, which costs
all survivors their state and some ten seconds. A keeper is an actor that does nothing which could kill it. When a process
is lost, all processes leave the group, a waiting spare takes the lost one's place, and the new group goes on with the state
that the survivors remember.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imaml_dist.distributed.channel import Message
from imaml_dist.distributed.crew import Crew
from imaml_dist.distributed.rank_process import COMING_S, POLL_S, RankProcess
from imaml_dist.distributed.stop import Stop
from imaml_dist.errors import ClusterError

START_S = 180.0
"""For a process to come up: a busy machine imports torch slowly."""

LEAVE_S = 10.0
"""For the other keepers to see that the run has ended."""

STARTS = 3
"""Of a process, before this machine is taken for one that cannot have it."""

SPARE_S = 60.0
"""Without a spare after one was lost."""

FRUITLESS = 6
"""Generations in a row in which nothing was achieved. A run that has begun gives up sooner (`giving_up`), with more to say."""

JOIN_S = 5.0
"""For a process that was joining a group which is over already."""


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds.

    Attributes:
        silence: for a sign of life of a process, which gives two a second.
        collective: for the others in a collective operation, and for other keepers beyond that.
    """

    silence: float
    collective: float


class Keeper:
    """Keeps a rank alive until the run has come to its end.

    Args:
        process: of the rank; more will be started as they are needed, and all ended.
        crew: all keepers.
        order: what the rank's process is told when it joins a group, all but generation and reason.
        limits: how long to wait.
        failed: told type and message of an error that ends the run.
        preempted: whether this node will be taken away soon; asked often.
        before: why other keepers than these have not brought the run to its end; None if these are the first.
        spare: keep a second process waiting, which spares a lost one's successor the seconds that imports take.
    """

    def __init__(
        self,
        process: RankProcess,
        crew: Crew,
        order: Message,
        limits: Limits,
        failed: Callable[[str, str], None],
        preempted: Callable[[], bool] = lambda: False,
        before: str | None = None,
        spare: bool = True,
    ) -> None:
        self._crew, self._order, self._limits = crew, order, limits
        self._failed, self._preempted, self._with_spare = failed, preempted, spare
        self._process = process
        self._pace = POLL_S * max(1.0, crew.world / 64)  # one store answers all keepers
        self._spare: RankProcess | None = None
        self._cause, self._before = "", before
        self._has_failed = False
        self._reached = -1
        self._spare_from = 0.0

    def run(self) -> Stop | None:
        """Train to the end.

        Returns:
            Why the training ended; None if it failed, on whichever rank.

        Raises:
            PeerLostError: another keeper is gone, or the store.
            ClusterError: no process comes up here.
        """
        generation, best, fruitless = 0, -1, 0
        try:
            while True:
                if not self._has_failed:
                    self._make_ready()
                mine = [self._cause, self._has_failed, self._reached]
                told = self._crew.gather(generation, mine, self._limits.collective + START_S)
                causes = list(dict.fromkeys(cause for cause, _, _ in told if cause))
                after = "; ".join(causes) or ("the connection was lost" if generation else self._before)
                reached = max(step for _, _, step in told)
                fruitless, best = (0, reached) if reached > best else (fruitless + 1, best)
                if fruitless > FRUITLESS and self._crew.rank == 0:
                    self._fail(
                        "TrainingError",
                        f"the workers were lost {fruitless} times before they could begin; the last time {after}",
                    )
                if fruitless > FRUITLESS or any(failed for _, failed, _ in told):
                    self._crew.leave(LEAVE_S)
                    return None
                self._cause = ""
                self._process.join(generation=generation, after=after, **self._order)
                end = self._watch(generation)
                if end is not self._LOST:
                    self._crew.leave(LEAVE_S)
                    return end
                generation += 1
        finally:
            self._process.kill()
            if self._spare is not None:
                self._spare.kill()

    _LOST = Stop.NOT_YET
    """The end of a generation, not of the run."""

    def _make_ready(self) -> None:
        """Have a process that can join a group: the one there is, the spare, or a new one."""
        for _ in range(STARTS):
            if not self._process.alive:
                self._process.kill()
                spare, self._spare = self._spare, None
                self._process = spare if spare is not None and spare.alive else RankProcess()
            if self._process.wait_until_ready(START_S):
                return
            self._process.kill()
        raise ClusterError(
            f"the process of rank {self._crew.rank} did not come up ({self._process.how_it_ended()}); see this worker's log of Ray"
        )

    def _tend_spare(self) -> None:
        """Have one, and let it go if it is not well: a machine without memory for it does without for a while."""
        if self._spare is None and time.monotonic() > self._spare_from:
            with suppress(OSError):
                self._spare = RankProcess()
        elif self._spare is not None:
            self._spare.hear(0)
            if not self._spare.alive or self._spare.silent > max(self._limits.silence, START_S):
                self._spare.kill()
                self._spare, self._spare_from = None, time.monotonic() + SPARE_S

    def _watch(self, generation: int) -> Stop | None:
        process, crew = self._process, self._crew
        begun, ended, warned = process.step, None, False
        # A process waits so long for the others to come, and then for the group to be made, before it says that one is lost.
        longest, since = 2 * self._limits.collective + COMING_S + JOIN_S, time.monotonic()
        while crew.over(generation) is None:
            for message in self._heard():
                match message["said"]:
                    case "ended":
                        ended = Stop(message["stop"])
                        crew.finished(generation)
                    case "lost":
                        self._cause = message["why"]
                        crew.end(generation)
                    case "failed":
                        crew.end(generation, failed=True)
            if ended is not None:  # nobody needs it any more, unless this generation is lost
                pass
            elif not process.alive:
                self._heard()
                self._cause = self._cause or f"{self._who} ended with {process.how_it_ended()}"
                crew.end(generation)
            elif process.silent > self._limits.silence:
                self._lose(f"was silent for {process.silent:.1f} s")
                crew.end(generation)
            elif process.stuck > self._limits.collective + JOIN_S:  # nobody waits for it: all hang, or it is alone
                limit = f"run.collective_timeout is {self._limits.collective:g}"
                self._lose(f"computed one chunk of tasks for {process.stuck:.0f} s, {limit}")
                crew.end(generation)
            elif process.joining and time.monotonic() - since > longest:
                self._lose(f"did not join its group for {longest:.0f} s")
                crew.end(generation)
            elif self._with_spare and process.step > begun >= 0:  # a spare is in the way of a first step
                self._tend_spare()
            if ended is not None and crew.all_finished(generation):
                return ended
            begun = process.step if begun < 0 else begun
            if not warned and self._preempted():
                warned = True
                process.save()
        return None if crew.over(generation) == "failed" else self._left()

    def _left(self) -> Stop:
        """Wait until the process has left a group that is over: it finds out as the others close their connections."""
        process, since = self._process, time.monotonic()
        while process.alive and process.member:
            self._heard()
            waited = time.monotonic() - since
            longest = JOIN_S if process.joining else self._limits.collective + JOIN_S
            if process.silent > self._limits.silence or max(waited, process.stuck) > longest:
                self._lose(f"did not leave its group for {max(waited, process.stuck):.0f} s")
        return self._LOST

    def _heard(self) -> list[Message]:
        """What the process says; one that has crashed or is at fault is not trusted with another group."""
        news = self._process.hear(self._pace)
        self._reached = max(self._reached, self._process.step)
        for message in news:
            if message["said"] == "crashed":
                self._lose(f"crashed ({message['why']})")
            elif message["said"] == "faulty":
                self._lose("was replaced")
            elif message["said"] == "failed":
                self._fail(message["type"], message["message"])
        return news

    def _fail(self, kind: str, message: str) -> None:
        self._has_failed = True
        self._crew.tell_failure(kind, message)
        self._failed(kind, message)

    def _lose(self, why: str) -> None:
        self._cause = f"{self._who} {why}"
        self._process.kill()

    @property
    def _who(self) -> str:
        return f"rank {self._crew.rank} (process {self._process.pid})"
