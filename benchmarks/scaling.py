"""How much faster are two workers than one, how much of two cores do they use, and what would many do?

imaml prepare glyphs --out data/glyphs
python benchmarks/scaling.py --data data/glyphs --repeats 7 --json scaling.json
python benchmarks/scaling.py --from scaling.json --bandwidth 12.5 --alpha 2e-5 --compute 0.2

Two processes of one thread each run the training loop as `imaml train` does (`distributed.worker`, without Ray around it):
5-way 1-shot, Conv-4, the default algorithm, 16 tasks a step in chunks of 4. They take turns as one worker alone, as two that know
nothing of each other, and as two that share every step and reduce over gloo, exactly and fast. Efficiency is what two that
reduce reach of two that do not; with twice the tasks, that is weak scaling. Ratios are medians of pairs from the same turn. The
first step of every loop is left out; what a loop does between steps counts.

Then the exact reduction by itself, over gloo, between 2, 3 and 4 processes (more than cores: shown, not fitted), and the time in which
a worker works out who holds what among up to 1,024. From all that `scaling_model.py` predicts a step of up to 1,024 workers with as
many tasks for each. `--from` does so again from a report, measuring nothing; options put assumptions in place of what was measured.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meta_gradient import facts
from reduction_costs import plannings, reductions
from scaling_model import (
    Inputs,
    changed,
    inputs_of,
    most_rows,
    prediction,
    reduction_bytes,
    reduction_messages,
    table,
)

from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import resolve
from imaml_dist.distributed.group import Alone, ProcessGroup
from imaml_dist.distributed.worker import Worker
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

TASKS, CHUNK = 16, 4

ARRANGEMENTS = {
    "one worker": (1, "exact", TASKS),
    "two that do not reduce": (1, "exact", TASKS),
    "two workers, exact": (2, "exact", TASKS),
    "two workers, fast": (2, "fast", TASKS),
    "two workers, twice the tasks": (2, "exact", 2 * TASKS),
}
"""Workers in a group, how they reduce, and tasks a step."""

CONV4 = 113_221
"""Numbers of the meta-gradient in these loops."""


def configuration(data: str, steps: int, workers: int, reduction: str, tasks: int) -> ExperimentConfig:
    """The library's defaults, without what is done besides training."""
    raw = {
        "name": "scaling",
        "data": {"url": data, "way": 5, "shot": 1, "query": 5},
        "run": {
            "steps": steps,
            "tasks_per_step": tasks,
            "chunk": CHUNK,
            "workers": workers,
            "reduction": reduction,
            "checkpoint_every": steps,
            "deal": "even",  # how late a worker is shows only where all have equally much to do
            "device": "cpu",
        },
        "validate": {"tasks": 0},
        "evaluate": {"tasks": 0},
    }
    return resolve(build_config(raw), cuda=False)


def process(rank: int, folder: Path, data: str, steps: int, repeats: int) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for turn in range(repeats):
        for name, (workers, reduction, tasks) in ARRANGEMENTS.items():
            config = configuration(data, steps, workers, reduction, tasks)
            run = RunDirectory(run_of(folder, turn, name, 0 if workers == 2 else rank))
            if rank == 0 or name == "two that do not reduce":
                run.begin(config)
            dist.barrier()
            if rank == 0 or name != "one worker":
                Worker(config, run, ProcessGroup() if workers == 2 else Alone()).run_to_end()
            dist.barrier()
        if rank == 0:
            print(".", end="", flush=True)
    dist.destroy_process_group()


def run_of(folder: Path, turn: int, name: str, rank: int) -> Path:
    """Where one loop leaves its records."""
    return folder / f"{turn}-{name.replace(' ', '-')}-{rank}"


def rate_and_split(run: Path, tasks: int) -> tuple[float, dict[str, float]]:
    """Tasks a second of a loop, and milliseconds of a step by phase."""
    records = metrics_file.read(RunDirectory(run).metrics_file)
    later = records[1:]
    rate = tasks * len(later) / (records[-1]["time"] - records[0]["time"])
    step = 1e3 * tasks / rate
    keys = [key for key in later[0] if key.startswith("seconds_") and not key.endswith(("_step", "_rank"))]
    split = {key.removeprefix("seconds_"): 1e3 * statistics.fmean(r[key] for r in later) for key in keys}
    return rate, split | {"rest": step - sum(split.values()), "step": step}


def summarised(folder: Path, repeats: int) -> dict[str, Any]:
    """Rates, paired ratios and the split of a step, by arrangement."""
    turns: list[dict[str, float]] = []
    splits: dict[str, list[dict[str, float]]] = {name: [] for name in ARRANGEMENTS}
    for turn in range(repeats):
        rates = {}
        for name in ARRANGEMENTS:
            ranks = 2 if name == "two that do not reduce" else 1
            loops = [rate_and_split(run_of(folder, turn, name, rank), ARRANGEMENTS[name][2]) for rank in range(ranks)]
            rates[name] = sum(rate for rate, _ in loops)
            splits[name].append(loops[0][1])
        turns.append(rates)
    one, apart = list(ARRANGEMENTS)[:2]
    return {
        name: {
            "tasks_per_second": statistics.median(turn[name] for turn in turns),
            "spread": [min(turn[name] for turn in turns), max(turn[name] for turn in turns)],
            "speed_up": statistics.median(turn[name] / turn[one] for turn in turns),
            "efficiency": statistics.median(turn[name] / turn[apart] for turn in turns),
            "efficiency_spread": [min(t[name] / t[apart] for t in turns), max(t[name] / t[apart] for t in turns)],
            "ms": {key: statistics.median(split[key] for split in splits[name]) for key in splits[name][0]},
        }
        for name in ARRANGEMENTS
    }


def lateness(folder: Path, repeats: int) -> list[float]:
    """Seconds that either worker computed in a step, over the mean of its turn: whatever drifts between turns is left out."""
    found: list[float] = []
    for turn in range(repeats):
        run = RunDirectory(run_of(folder, turn, "two workers, twice the tasks", 0))
        later = metrics_file.read(run.metrics_file)[1:]
        seconds = [record[f"seconds_{which}_rank"] for record in later for which in ("fastest", "slowest")]
        found += [round(value / statistics.fmean(seconds), 4) for value in seconds]
    return found


def measured(data: str, steps: int, repeats: int) -> dict[str, Any]:
    """The report: what was measured and what it depends on."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (Path(folder), data, steps, repeats), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        print()
        rows, late = summarised(Path(folder), repeats), lateness(Path(folder), repeats)
    return {
        **facts(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "processes": 2,
        "steps": steps,
        "repeats": repeats,
        "rows": rows,
        "parameters": CONV4,
        "chunks": TASKS // CHUNK,
        "chunk": CHUNK,
        "lateness": late,
        "reduction": reductions(15),
        "planning": plannings(TASKS // CHUNK),
    }


def show_measured(rows: dict[str, Any]) -> None:
    """Rates and the split of a step."""
    print(f"{'':28} {'tasks/s':>8} {'(spread)':>14} {'speed-up':>9} {'efficiency':>11} {'(spread)':>14}")
    for name, row in rows.items():
        spread = "({:.1f}..{:.1f})".format(*row["spread"])
        efficiency = "{:11.0%} {:>14}".format(row["efficiency"], "({:.0%}..{:.0%})".format(*row["efficiency_spread"]))
        reduces = name.startswith("two workers")
        print(
            f"{name:28} {row['tasks_per_second']:8.2f} {spread:>14} {row['speed_up']:8.2f}x{efficiency if reduces else ''}"
        )
    print(f"\n{'ms a step':28}" + "".join(f"{key:>9}" for key in rows["one worker"]["ms"]))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{value:9.1f}" for value in row["ms"].values()))


def show_fit(report: dict[str, Any], inputs: Inputs) -> None:
    """How well the line meets the reductions that were measured."""
    print(
        f"\nalpha {1e6 * inputs.alpha:.1f} us a message, beta {1e9 * inputs.beta:.3f} ns a byte ({1e-9 / inputs.beta:.2f} GB/s), "
        f"gamma {1e6 * inputs.gamma:.2f} us a node, fitted to {report['cores']} processes"
    )
    print(f"{'processes':>9} {'numbers':>9} {'k':>2} {'measured ms':>12} {'line ms':>9}")
    for point in report["reduction"]:
        world, rows = point["workers"], most_rows(point["chunks"], point["workers"])
        line = inputs.alpha * reduction_messages(rows, world)
        line += inputs.beta * reduction_bytes(point["parameters"], rows, world)
        print(f"{world:9} {point['parameters']:9} {rows:2} {1e3 * point['seconds']:12.2f} {1e3 * line:9.2f}")


def assumed(inputs: Inputs, options: argparse.Namespace) -> Inputs:
    """The inputs with what the command line gives in their place."""
    return changed(
        inputs,
        compute=options.compute,
        rest=options.rest,
        alpha=options.alpha,
        beta=None if options.bandwidth is None else 1e-9 / options.bandwidth,
        parameters=options.parameters,
        chunks=options.chunks,
        chunk=options.chunk,
        lateness=() if options.no_stragglers else None,
    )


def main() -> None:
    """Measure or read, predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/glyphs", help="a prepared data set")
    parser.add_argument("--steps", type=int, default=12, help="of each loop, one of which is left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from", type=Path, dest="report", help="predict from this report and measure nothing")
    assumptions = parser.add_argument_group("assumptions, in place of what was measured")
    assumptions.add_argument("--compute", type=float, help="seconds that a worker computes in a step")
    assumptions.add_argument("--rest", type=float, help="seconds of a step that do not depend on the workers")
    assumptions.add_argument("--alpha", type=float, help="seconds a message")
    assumptions.add_argument("--bandwidth", type=float, help="GB/s that a worker sends, 1e-9 / beta")
    assumptions.add_argument("--parameters", type=int, help="numbers of the meta-gradient")
    assumptions.add_argument("--chunks", type=int, help="of a worker")
    assumptions.add_argument("--chunk", type=int, help="tasks of a chunk")
    assumptions.add_argument("--no-stragglers", action="store_true", help="all workers take equally long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    read = json.loads(options.report.read_text()) if options.report else None
    report = read or measured(options.data, options.steps, options.repeats)
    show_measured(report["rows"])
    inputs = inputs_of(report)
    show_fit(report, inputs)
    report["prediction"] = prediction(inputs)
    given = assumed(inputs, options)
    what = "from what was measured here" if given == inputs else "from assumptions"
    print(f"\nPredicted, {what}: {given.chunks * given.chunk} tasks a worker, P = {given.parameters:,}, ", end="")
    print(f"{given.compute:.3f} s of computing, {given.rest:.3f} s of the rest\n{table(prediction(given))}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
