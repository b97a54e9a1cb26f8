"""What an exact reduction costs by itself: between processes that do nothing else, and within one as the group grows."""

import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling_model import WORLDS

from imaml_dist.distributed.chunks import dealt_to, even_deal
from imaml_dist.distributed.group import ProcessGroup
from imaml_dist.distributed.reduction import ExactSum, own_nodes
from imaml_dist.kernels.memory import keep_freed_memory

SIZES = (10_000, 113_221, 1_000_000, 4_000_000)
GROUPS, EACH = (2, 3, 4), (1, 3)
"""The reductions measured by themselves: numbers, processes, and chunks of a process (k is 1 and 2 at most)."""


def reduce_process(rank: int, world: int, rendezvous: str, repeats: int, out: Any) -> None:
    """One process of a group that does nothing but reduce; all sizes take turns."""
    keep_freed_memory()  # as workers do
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    group, cells = ProcessGroup(), [(size, each) for size in SIZES for each in EACH]
    seconds: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    for _ in range(repeats + 1):
        for size, each in cells:
            mine = torch.ones(each, size)
            dist.barrier()
            began = time.perf_counter()
            total = ExactSum(group, even_deal(world, each * world), mine.new_empty(0), size)
            for row in mine:
                total.add(row)
            total.finish()
            seconds[size, each].append(time.perf_counter() - began)
    if rank == 0:
        out.put(
            [
                {"workers": world, "parameters": size, "chunks": each, "seconds": statistics.median(times[1:])}
                for (size, each), times in seconds.items()
            ]
        )
    dist.destroy_process_group()


def reductions(repeats: int) -> list[dict[str, float]]:
    """Median seconds of an exact reduction by number of processes, size, and chunks of each."""
    found: list[dict[str, float]] = []
    for world in GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            out = mp.get_context("spawn").Queue()
            arguments = (world, f"{folder}/rendezvous", repeats, out)
            processes = mp.spawn(reduce_process, arguments, nprocs=world, join=False)  # type: ignore[attr-defined, no-untyped-call]
            found += out.get()
            while not processes.join():
                pass
    return found


def plannings(chunks: int) -> list[dict[str, float]]:
    """Median seconds of five in which one worker works out the nodes of all, as `ExactSum` does in every step."""

    def seconds(world: int) -> float:
        began = time.perf_counter()
        for rank in range(world):
            own_nodes(dealt_to(rank, world, chunks * world), chunks * world)
        return time.perf_counter() - began

    return [
        {"workers": world, "seconds": statistics.median(seconds(world) for _ in range(5))}
        for world in WORLDS
        if world >= 16
    ]
