"""Whether all ranks still hold the same state, and which of them is at fault if not.

Every rank steps the same numbers with the same sums, so their states are equal in every bit for as long as every machine computes
and remembers rightly. A state that differs spreads: the gradients taken at it are in everybody's next sum. So a disagreement
sends all ranks back to the last state that all had agreed on, from where the steps are taken again, and the rank at fault
gets a new process:

- where most ranks agree, it is those who do not;
- else (two ranks) it is found out after the steps have been taken again: the one whose states had left the right way first.

A wrong gradient of a right state is in everybody's sum, and is not seen here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

AT_ONCE = {"cpu": 1 << 16}
"""Numbers, by kind of device: so many as stay in the cache of a core."""

AT_ONCE_ELSEWHERE = 1 << 22
"""So that a large state needs no second one of integers."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[Tensor]) -> int:
    """`sum_i (2 i + 1) b_i mod 2^64` over the bits `b_i` of all numbers as integers, in order: a change of one number changes it.

    Computed where the tensors are, with integers, so that it does not depend on the order of additions.
    """
    sums, begin = [], 0
    for bits in _pieces(tensors):
        whole = bits.to(torch.int64)
        sums.append((whole * _weights(bits.device)[: len(bits)]).sum() + 2 * begin * whole.sum())
        begin += len(bits)
    # Optimisers keep their counts of steps on the CPU, wherever the parameters are: one sum a device, one wait for each.
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in sums:
        by_device.setdefault(one.device, []).append(one)
    return sum(int(torch.stack(on_device).sum()) for on_device in by_device.values()) % 2**64


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bits of all numbers in order, neighbours of one kind joined: many small tensors cost as much as there are numbers in them."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        most = _at_once(bits.device)
        for part in torch.split(bits, most):
            alike = not waiting or (part.dtype, part.device) == (waiting[0].dtype, waiting[0].device)
            if not alike or sum(map(len, waiting)) + len(part) > most:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(part)
    if waiting:
        yield torch.cat(waiting)


def _at_once(device: torch.device) -> int:
    return AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """`2 i + 1`."""
    return torch.arange(_at_once(device), device=device).mul_(2).add_(1)


@dataclass
class Course:
    """The checksums of a rank's states, step by step.

    They are taken just before the update: after all that a step makes of the state, and before a wrong one of another rank can
    have reached this one through the sum.

    Attributes:
        step: the first meta-step.
        sums: of each step from there on; in the end one of the state as it is compared.
    """

    step: int
    sums: list[int] = field(default_factory=list)

    def fold(self) -> int:
        """All of them in 64 bits. Not only the last: a flipped bit may be rounded away by the next update, but its gradient remains."""
        folded = 1
        for one in self.sums:
            folded = (folded * 0x100000001B3 + one) % 2**64
        return folded

    def left_at(self, right: Course) -> int | None:
        """The first step in which this course and the right one, which begins where this one does, differ."""
        differing = (n for n, (mine, true) in enumerate(zip(self.sums, right.sums, strict=False)) if mine != true)
        return next((self.step + n for n in differing), None)


def minority(sums: Sequence[int]) -> list[int] | None:
    """Ranks that differ from what more than half of them agree on; None where no half does."""
    most, count = Counter(sums).most_common(1)[0]
    return [rank for rank, found in enumerate(sums) if found != most] if 2 * count > len(sums) else None


def first_to_leave(steps: Sequence[int | None]) -> list[int]:
    """Ranks that left the right way before the others did; none if none did."""
    earliest = min((step for step in steps if step is not None), default=None)
    return [rank for rank, step in enumerate(steps) if step is not None and step == earliest]
