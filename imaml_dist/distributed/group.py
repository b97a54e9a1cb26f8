"""The workers of a run as one of them sees the others: what they tell each other, and that one of them is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from imaml_dist.errors import ImamlError, PeerLostError


class Group(Protocol):
    """The workers of a run, as seen by one of them. Every call is one that all ranks make together, in the same order.

    Raises:
        PeerLostError: by any of the calls: a rank has died, is silent, or does not take part any more.
    """

    rank: int
    world: int

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor, in order of ranks; all have one shape."""
        ...

    def exchange(self, mine: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """To every rank one segment of one's rows, and from every rank that segment of its rows which is one's own; begins it.

        Args:
            mine: `[W, k, n]`, segment s of the k rows of this rank at s.
            counts: k of every rank.

        Returns:
            What waits for the end: `[sum(counts), n]`, in order of ranks.
        """
        ...

    def sum(self, mine: Tensor) -> Tensor:
        """Sum over ranks, in the communication library's own order."""
        ...

    def broadcast(self, data: bytes, source: int) -> bytes:
        """The bytes of rank `source`, whatever the others give."""
        ...


class Alone:
    """A group of one."""

    rank, world = 0, 1

    def gather(self, mine: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        return [mine]

    def exchange(self, mine: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See `Group.exchange`."""
        return lambda: mine[0]

    def sum(self, mine: Tensor) -> Tensor:
        """See `Group.sum`."""
        return mine

    def broadcast(self, data: bytes, source: int) -> bytes:
        """See `Group.broadcast`."""
        return data


class ProcessGroup:
    """The default process group of torch.distributed, which must be initialised."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, mine: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        with losses():
            dist.all_gather(parts, mine.contiguous())
        return parts

    def exchange(self, mine: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See `Group.exchange`."""
        width = mine.shape[2]
        found = mine.new_empty(sum(counts) * width)
        given, sizes = mine.reshape(-1), [count * width for count in counts]
        with losses():
            work = dist.all_to_all_single(found, given, sizes, [mine.shape[1] * width] * self.world, async_op=True)

        def received() -> Tensor:
            with losses():
                work.wait()
            return found.view(-1, width)

        return received

    def sum(self, mine: Tensor) -> Tensor:
        """See `Group.sum`."""
        total = mine.clone()
        with losses():
            dist.all_reduce(total)
        return total

    def broadcast(self, data: bytes, source: int) -> bytes:
        """See `Group.broadcast`."""
        size = torch.tensor([len(data)])
        with losses():
            dist.broadcast(size, source)
            found = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == source:
                found = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(found, source)
        return found.numpy().tobytes()


@contextmanager
def losses() -> Iterator[None]:
    """torch does not tell a lost peer from anything else: whatever goes wrong between the ranks is one.

    Raises:
        PeerLostError: torch raised.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"another worker does not answer any more ({error})") from error


def first_rank_decides(group: Group, decide: Callable[[], int]) -> int:
    """What rank 0's `decide` returns, on every rank. What it raises is raised on every rank, so that none waits for another.

    It may take long, as storage does that is away for a while: rank 0 gives the others a sign of life meanwhile.

    Raises:
        ImamlError: raised by `decide`; ranks other than 0 only know that it was.
    """
    result: list[int] = []
    error: list[BaseException] = []

    def call() -> None:
        try:
            result.append(decide())
        except BaseException as caught:  # raised below
            error.append(caught)

    thread = threading.Thread(target=call, name="deciding", daemon=True)
    if group.rank == 0:
        thread.start()
    while True:
        if group.rank == 0:
            thread.join(SIGN_OF_LIFE_S)
        if error and not isinstance(error[0], ImamlError):
            raise error[0]
        choice = [_DECIDED, result[0]] if result else [_GAVE_UP if error else _DECIDING, 0]
        state, value = group.gather(torch.tensor(choice, dtype=torch.int64))[0].tolist()
        if error:
            raise error[0]
        if state == _GAVE_UP:
            raise ImamlError("rank 0 gave up; its own error says why")
        if state == _DECIDED:
            return int(value)


SIGN_OF_LIFE_S = 1.0
"""Between two; far less than any `run.collective_timeout`."""

_DECIDING, _DECIDED, _GAVE_UP = range(3)
