"""How many tasks fit into memory together: what a call adds to it, measured on calls that are made anyway, and what is free.

A GPU that has too little raises an error, and the call is made again in parts. A CPU's system ends the process instead, so there
nothing may be tried that is not known to fit.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from imaml_dist.errors import NoRoomError

SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of what is free, what a call may be predicted to take. On a CPU other processes take theirs at the same moment."""

TRIAL = 20.0
"""A task's meta-gradient is guessed to take less than this many times what trying the network with one task took. That is a second
derivative in float64, and three times what an implicit method takes; an unrolled one keeps the graphs of all inner steps."""

Root = Path("/")

Result = TypeVar("Result")


class MemoryModel:
    """Memory that a call with T tasks of one shape adds at its peak: `a + b T` bytes, the same learner and device given.

    Up to the largest T measured the line goes through the smallest and the largest T; beyond, and with one measurement, a is taken
    to be 0, which errs on the large side: a heap breaks up into other pieces every time, a third more or less, and a line
    through two close points could promise anything. Measured is the first call, and one with twice as many tasks as any before.

    On a CPU the peak is the kernel's (`VmHWM`, set back before; `clear_refs`), with all free blocks given back to the system first,
    for those would be used again and not be seen; heap that cannot be used again counts. On a GPU it is that of torch's
    allocator, set back before. Others who read these peaks of the process see them set back too. Where a CPU's kernel or C
    library has no such thing, and on other devices, nothing is measured and nothing predicted: all tasks are computed in one call.

    Args:
        device: where the calls are made.
        trial: bytes that trying the network with one task took, None if not known.
    """

    def __init__(self, device: torch.device, trial: int | None = None) -> None:
        self.measured: dict[int, int] = {}
        self._device, self._trial = device, trial
        self._most = sys.maxsize  # tasks at once that have not failed
        self._known = can_measure(device)

    def bytes(self, tasks: int) -> float:
        """Predicted for a call; at least one must have been measured."""
        low, high = min(self.measured), max(self.measured)
        if tasks > high or low == high:
            return self.measured[high] * tasks / high
        slope = max(0.0, (self.measured[high] - self.measured[low]) / (high - low))
        return self.measured[low] + slope * (tasks - low)

    def needs_probe(self, tasks: int) -> bool:
        """Whether to make a call with a few of the tasks first: nothing is measured, and all of them might not fit."""
        if not self._known or self._device.type != "cpu" or self.measured or tasks < 4:
            return False
        return self._trial is None or TRIAL * self._trial * tasks > SHARE["cpu"] * free_bytes(self._device)

    def calls(self, tasks: int, compute: Callable[[slice], Result]) -> Iterator[tuple[int, Result | None]]:
        """`tasks` tasks in one call, or in several where memory does not do for all at once.

        Args:
            tasks: in all.
            compute: makes a call with some of them.

        Returns:
            How many each call had and what it returned, in order; None where the two or three of a smallest one did not fit.

        Raises:
            NoRoomError: see `next_call`.
        """
        if self.needs_probe(tasks):
            self._attempt(slice(0, 2), compute)
        begin = 0
        while begin < tasks:
            size = self.next_call(tasks - begin)
            found = self._attempt(slice(begin, begin + size), compute)
            # Only now is an error gone, and with it the frames that hold what did not fit: before, nothing can be allocated.
            if found is None and size >= 4:
                self.failed(size)
                continue
            yield size, found
            begin += size

    def _attempt(self, part: slice, compute: Callable[[slice], Result]) -> Result | None:
        """None where memory did not do."""
        with suppress(torch.OutOfMemoryError), self.watched(part.stop - part.start):
            return compute(part)
        return None

    def next_call(self, tasks: int) -> int:
        """How many of `tasks` tasks to compute now: all if they fit, else the first of parts of about the same size that do.

        Parts have two tasks at least. Where not even the smallest is predicted to fit, a GPU is given it all the same, and has the
        last word.

        Raises:
            NoRoomError: on a CPU, where not even the smallest is predicted to fit into all that is free.
        """
        sizes = [size for size in part_sizes(tasks) if size <= self._most] or part_sizes(tasks)[-1:]
        if not self.measured:
            return sizes[0]
        share = SHARE[self._device.type]
        if self.bytes(sizes[0]) <= share * free_bytes(self._device):
            return sizes[0]
        give_back(self._device)
        free = free_bytes(self._device)
        for size in sizes:
            if self.bytes(size) <= share * free:
                return size
        needed = self.bytes(sizes[-1])
        if self._device.type == "cpu" and needed > free:
            raise NoRoomError(
                f"a call with {sizes[-1]} tasks takes {needed / 1e9:.2g} GB of memory, and {free / 1e9:.2g} GB are free; end other "
                "programs, or use fewer workers on this machine, smaller tasks, or a smaller network"
            )
        return sizes[-1]

    def failed(self, tasks: int) -> None:
        """So many did not fit: from now on fewer."""
        self._most = tasks - 1

    @contextmanager
    def watched(self, tasks: int) -> Iterator[None]:
        """Around a call with `tasks` tasks: measures it where that tells something new."""
        if not self._known or (self.measured and tasks < 2 * max(self.measured)):
            yield
            return
        added = peak_bytes(self._device)
        yield
        self.measured[tasks] = added()


def part_sizes(tasks: int) -> list[int]:
    """Sizes of the largest of 1, 2, 3, ... parts of `tasks` tasks, two tasks or more in each.

    Multiples of four have multiples of four as parts while they can: networks whose layers are of odd widths do not have the same
    bits in other parts (ends of vectors are summed in another order), measured with 4, 8, 12 and 16 tasks under `vmap`.
    """
    sizes = [-(-tasks // parts) for parts in range(1, max(1, tasks // 2) + 1)]
    if tasks % 4 == 0:
        sizes = [size if size < 4 else -(-size // 4) * 4 for size in sizes]
    return list(dict.fromkeys(sizes))


def can_measure(device: torch.device, root: Path = Root) -> bool:
    """Whether `peak_bytes` and `free_bytes` are to be had."""
    if device.type == "cpu":
        try:
            (root / "proc/self/clear_refs").write_text("5")
            return hasattr(_c_library(), "malloc_trim") and _kilobytes(root, "self/status", "VmHWM:") > 0
        except OSError:
            return False
    return device.type == "cuda"


def peak_bytes(device: torch.device, root: Path = Root) -> Callable[[], int]:
    """From now on; what is returned tells how far memory in use has been above what it is now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    give_back(device)
    (root / "proc/self/clear_refs").write_text("5")  # VmHWM is what is resident now
    base = _kilobytes(root, "self/status", "VmHWM:")
    return lambda: 1024 * (_kilobytes(root, "self/status", "VmHWM:") - base)


def give_back(device: torch.device) -> None:
    """Free blocks of the heap to the system, which `free_bytes` then counts; torch's on a GPU are counted where they are."""
    if device.type == "cpu" and hasattr(_c_library(), "malloc_trim"):
        _c_library().malloc_trim(0)


def free_bytes(device: torch.device, root: Path = Root) -> int:
    """What a call could take now: the smaller of what the system and the control groups around this process have left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([1024 * _kilobytes(root, "meminfo", "MemAvailable:"), *_left_in_groups(root)])


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
"""Limit, use, and the parts of the use that are a cache of files and given up on demand; files in memory (tmpfs) are not in these."""


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit minus use of every memory control group that this process is in, those around it too."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, (most, used, caches) = root / "sys/fs/cgroup", V1 if controllers else V2
        mount = mount / "memory" if controllers else mount
        inner = mount / name.lstrip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))):
            try:
                limit = (folder / most).read_text().strip()
                if limit == "max":
                    continue
                facts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield int(limit) - int((folder / used).read_text()) + sum(int(facts.get(cache, 0)) for cache in caches)
            except OSError:  # the outermost has no limit, and in a container the outer ones are not to be seen
                continue


def _kilobytes(root: Path, file: str, what: str) -> int:
    """A line of an account of the kernel's; 0 where it is not there."""
    for line in (root / "proc" / file).read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1])
    return 0


def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
