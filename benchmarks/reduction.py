"""What does a sum cost that has the same bits on any number of workers, beside a plain all-reduce?

python benchmarks/reduction.py --workers 2 --repeats 15 --json reduction.json

Each of the processes holds its share of a step's chunk rows (float32) and reduces them over gloo, exactly along the tree, by one
plain all-reduce, and as one does without segments: all rows gathered everywhere. All take turns; ratios are medians of pairs
from the same turn. Adding up a rank's own rows counts for all three.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meta_gradient import facts
from torch import Tensor

from imaml_dist.distributed.chunks import dealt_to, even_deal
from imaml_dist.distributed.group import ProcessGroup
from imaml_dist.distributed.reduction import ExactSum, FastSum, gather_chunks, tree_sum
from imaml_dist.kernels.memory import keep_freed_memory

SIZES = {"Conv-4": 113_221, "10M": 10_000_000}
CHUNKS = (4, 6, 8)


def summed(how: type[ExactSum | FastSum], group: ProcessGroup, mine: Tensor, chunks: int) -> Tensor:
    """As a meta-step does, but with all rows at once, so that nothing is hidden."""
    total = how(group, even_deal(group.world, chunks), mine.new_empty(0), mine.shape[1])
    for row in mine:
        total.add(row)
    return total.finish()


def gathered(group: ProcessGroup, mine: Tensor, chunks: int) -> Tensor:
    """All rows everywhere, added everywhere alike."""
    return tree_sum(gather_chunks(group, mine, even_deal(group.world, chunks)))


def process(rank: int, world: int, rendezvous: str, repeats: int, out: Any) -> None:
    """One of the workers."""
    keep_freed_memory()  # as workers do
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    group, rows = ProcessGroup(), []
    for name, size in SIZES.items():
        for chunks in CHUNKS:
            mine = torch.randn(len(dealt_to(rank, world, chunks)), size)
            methods: dict[str, Callable[[], Tensor]] = {
                "exact": partial(summed, ExactSum, group, mine, chunks),
                "all-reduce": partial(summed, FastSum, group, mine, chunks),
                "gather all": partial(gathered, group, mine, chunks),
            }
            turns = []
            for _ in range(repeats + 1):
                turn = {}
                for method, reduce in methods.items():
                    dist.barrier()
                    began = time.perf_counter()
                    reduce()
                    turn[method] = 1e3 * (time.perf_counter() - began)
                turns.append(turn)
            rows.append({"size": name, "chunks": chunks, "turns": turns[1:]})
    if rank == 0:
        out.put(rows)
    dist.destroy_process_group()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = mp.get_context("spawn").Queue()
        arguments = (options.workers, f"{folder}/rendezvous", options.repeats, out)
        processes = mp.spawn(process, arguments, nprocs=options.workers, join=False)  # type: ignore[attr-defined, no-untyped-call]
        measured = out.get()
        processes.join()
    rows = []
    print(
        f"{'numbers':10} {'chunks':>6} {'exact':>10} {'all-reduce':>11} {'gather all':>11} {'to all-reduce':>14} {'to gather all':>14}"
    )
    for row in measured:
        turns = row.pop("turns")
        ms = {method: statistics.median(turn[method] for turn in turns) for method in turns[0]}
        ratios = {
            f"to {other}": statistics.median(turn["exact"] / turn[other] for turn in turns)
            for other in ("all-reduce", "gather all")
        }
        rows.append({**row, "ms": ms, **ratios})
        print(
            f"{row['size']:10} {row['chunks']:6} {ms['exact']:7.2f} ms {ms['all-reduce']:8.2f} ms {ms['gather all']:8.2f} ms "
            f"{ratios['to all-reduce']:13.2f}x {ratios['to gather all']:13.2f}x"
        )
    if options.json:
        report = {**facts(), "workers": options.workers, "repeats": options.repeats, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
