"""What does a meta-gradient add to the memory of a process, over inner steps and over steps of conjugate gradient?

python benchmarks/memory.py --runs 3 --json memory.json --png memory.png

One task of the 20-way 5-shot setting of meta_gradient.py, float32, one thread. Every measurement is a fresh process: the peak
of its resident memory during a meta-gradient (the kernel's own VmHWM, set back just before; nothing is sampled) minus what was
resident before. By then everything is imported, network and data are built, and a network of eight channels has been through
the same method on the same images for one step, so that code and tables that are loaded once do not count. The tables tell the
median of the second to fourth meta-gradient, as all later ones are; the first, in which this library also tries whether the
network can be meta-trained, is told below and in the JSON.

Twice each: with every block of 128 kB and more mapped by itself, so that what is resident is what is in use, whatever the
allocator; and on glibc's heap as training runs have it, kept for the next tensor, which is faster and breaks up into pieces
that are resident and of no use, differently in every process. Takes half an hour to two hours and 4 GB; `make bench` takes
one process a cell, three numbers of inner steps and the first heap.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from meta_gradient import CG_STEPS, LAM, LR, STEPS, Method, facts, higher_maml, learned, ours, torchopt_imaml, work

from imaml_dist import MAML, GradientDescent
from imaml_dist.algorithms import memory as learners_memory
from imaml_dist.kernels.memory import keep_freed_memory
from imaml_dist.models.conv4 import Conv4

INNER = (1, 5, 16, 50, 100)
CG = (1, 5, 20)
WAY = 20

METHODS: dict[str, Callable[[int, int], Method]] = {
    "imaml_dist, Hessian": lambda steps, cg: ours("native", cg, LAM, LR, steps),
    "imaml_dist, Gauss-Newton": lambda steps, cg: ours("native", cg, LAM, LR, steps, "gauss_newton"),
    "TorchOpt iMAML": lambda steps, cg: torchopt_imaml("solve_normal_cg", cg, LAM, LR, steps),
    "imaml_dist, MAML": lambda steps, cg: learned(MAML(GradientDescent(LR, steps)), "native"),
    "higher, MAML": lambda steps, cg: higher_maml(steps),
}
"""By inner steps and steps of conjugate gradient; MAML has none of the latter."""

NEEDS = {"TorchOpt iMAML": "torchopt", "higher, MAML": "higher"}


def resident(what: str) -> float:
    """A line of the kernel's account of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"this system does not tell {what} of a process")


def map_blocks_apart() -> None:
    """From now on glibc maps every block of 128 kB and more by itself, and unmaps it when it is free."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 128 << 10)  # once set it no longer grows with the blocks that are freed


HEAPS: dict[str, Callable[[], Any]] = {"apart": map_blocks_apart, "kept": keep_freed_memory}
"""What the C library does with large blocks."""


def added(name: str, steps: int, cg_steps: int, heap: str) -> list[float]:
    """MB that the first meta-gradient, and a later one, add to this process."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # the others' use of older torch
    torch.set_num_threads(1)
    HEAPS[heap]()
    learners_memory.can_measure = lambda device, root=None: False  # a learner that looks sets the peak back
    model, episodes = work("20w5s", torch.float32, 1)
    METHODS[name](1, 1)(Conv4((1, 28, 28), WAY, channels=8), episodes)
    compute = METHODS[name](steps, cg_steps)
    found = []
    for _ in range(4):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would be used again, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is what is resident now
        base = resident("VmHWM")
        compute(model, episodes)
        found.append(resident("VmHWM") - base)
    return [found[0], statistics.median(found[1:])]


def measure(runs: int, names: list[str], cells: list[tuple[int, int]], heaps: list[str]) -> list[dict[str, Any]]:
    """Every method at every number of steps on these heaps, each in processes of its own."""
    rows: list[dict[str, Any]] = [
        {"method": name, "steps": steps, "cg_steps": cg, "heap": heap, "first": [], "runs": []}
        for name in names
        for steps, cg in cells
        if cg == CG_STEPS or "iMAML" in name or "MAML" not in name
        for heap in heaps
    ]
    for _ in range(runs):
        for row in rows:
            cell = [row["method"], str(row["steps"]), str(row["cg_steps"]), row["heap"]]
            done = subprocess.run([sys.executable, __file__, "--cell", *cell], capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(cell)} failed:\n{done.stderr}")
            for kind, mb in zip(("first", "runs"), json.loads(done.stdout), strict=True):
                row[kind].append(mb)
            print(".", end="", flush=True)
    print()
    return [row | {"mb": statistics.median(row["runs"]), "mb_first": statistics.median(row["first"])} for row in rows]


def curves(rows: list[dict[str, Any]], axis: str, fixed: str, at: int) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows with `fixed` = `at`, by method and by what is on the axis."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row[fixed] == at:
            found.setdefault(row["method"], {})[row[axis]] = row
    return found


def table(title: str, found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """MB, largest over smallest, and the widest spread of a cell's runs."""
    columns = sorted({x for curve in found.values() for x in curve})
    print(f"\n{title:34}" + "".join(f"{x:>8}" for x in columns) + f" {'max/min':>8} {'spread':>7}")
    for name, curve in found.items():
        medians = [row["mb"] for row in curve.values()]
        spread = max((max(row["runs"]) - min(row["runs"])) / row["mb"] for row in curve.values())
        cells = "".join(f"{curve[x]['mb']:8.0f}" if x in curve else f"{'':8}" for x in columns)
        print(f"{name:34}{cells} {max(medians) / min(medians):8.2f} {spread:7.0%}")


def draw(panels: list[tuple[str, dict[str, dict[int, dict[str, Any]]]]]) -> Figure:
    """A panel for each kind of step."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (label, found) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for name, curve in found.items():
            if len(curve) > 1:
                x = sorted(curve)
                axes.plot(x, [curve[k]["mb"] for k in x], label=name, marker="o", markersize=3)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("memory added, MB")
    figure.axes[0].legend()
    return figure


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inner", type=int, nargs="+", default=list(INNER))
    parser.add_argument("--cg", type=int, nargs="+", default=list(CG))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--heaps", nargs="+", choices=HEAPS, default=list(HEAPS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        name, steps, cg_steps, heap = options.cell
        return print(added(name, int(steps), int(cg_steps), heap))
    names = []
    for name in options.methods:
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            print(f"{name}: not measured, {NEEDS[name]} is not installed")
        else:
            names.append(name)
    cells = dict.fromkeys([(steps, CG_STEPS) for steps in options.inner] + [(STEPS, cg) for cg in options.cg])
    rows = measure(options.runs, names, list(cells), options.heaps)
    found = {
        heap: (
            curves([row for row in rows if row["heap"] == heap], "steps", "cg_steps", CG_STEPS),
            curves([row for row in rows if row["heap"] == heap], "cg_steps", "steps", STEPS),
        )
        for heap in options.heaps
    }
    for heap, (over_inner, over_cg) in found.items():
        print(f"\nBlocks {heap}")
        table(f"MB over inner steps, {CG_STEPS} of CG", over_inner)
        table(f"MB over CG steps, {STEPS} inner steps", over_cg)
    inner, cg = found[options.heaps[0]]
    longest = max(options.inner)
    print()
    for name, curve in found[options.heaps[-1]][0].items():
        print(
            f"{name}: the first meta-gradient of a process adds {max(row['mb_first'] for row in curve.values()):.0f} MB"
        )
    for name in (n for n in inner if n.startswith("imaml_dist") and "MAML" not in n):
        for other in (n for n in inner if n.endswith(", MAML")):
            ratio = inner[other][longest]["mb"] / inner[name][longest]["mb"]
            print(f"at {longest} inner steps {other} adds {ratio:.1f} times what {name} adds")
    if options.json:
        options.json.write_text(json.dumps({**facts(), "threads": 1, "rows": rows}, indent=1) + "\n")
    if options.png:
        draw([("inner steps", inner), ("steps of conjugate gradient", cg)]).savefig(options.png, dpi=110)
    return None


if __name__ == "__main__":
    main()
