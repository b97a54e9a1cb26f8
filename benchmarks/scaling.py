"""How much faster are two workers than one, and how much of two cores do they use?

imaml prepare glyphs --out data/glyphs
python benchmarks/scaling.py --data data/glyphs --repeats 7 --json scaling.json

Two processes of one thread each run the training loop as `imaml train` does (`distributed.worker`, without Ray around it):
5-way 1-shot, Conv-4, the default algorithm, 16 tasks a step in chunks of 4. They take turns as one worker alone, as two that know
nothing of each other, and as two that share every step and reduce over gloo, exactly and fast. Efficiency is what two that
reduce reach of two that do not. Ratios are medians of pairs from the same turn. The first step of every loop is left out; what a
loop does between steps counts.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meta_gradient import facts

from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import resolve
from imaml_dist.distributed.group import Alone, ProcessGroup
from imaml_dist.distributed.worker import Worker
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

TASKS, CHUNK = 16, 4

ARRANGEMENTS = {
    "one worker": (1, "exact"),
    "two that do not reduce": (1, "exact"),
    "two workers, exact": (2, "exact"),
    "two workers, fast": (2, "fast"),
}
"""Workers in a group, and how they reduce."""


def configuration(data: str, steps: int, workers: int, reduction: str) -> ExperimentConfig:
    """The library's defaults, without what is done besides training."""
    raw = {
        "name": "scaling",
        "data": {"url": data, "way": 5, "shot": 1, "query": 5},
        "run": {
            "steps": steps,
            "tasks_per_step": TASKS,
            "chunk": CHUNK,
            "workers": workers,
            "reduction": reduction,
            "checkpoint_every": steps,
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
        for name, (workers, reduction) in ARRANGEMENTS.items():
            config = configuration(data, steps, workers, reduction)
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


def rate_and_split(run: Path) -> tuple[float, dict[str, float]]:
    """Tasks a second of a loop, and milliseconds of a step by phase."""
    records = metrics_file.read(RunDirectory(run).metrics_file)
    later = records[1:]
    rate = TASKS * len(later) / (records[-1]["time"] - records[0]["time"])
    step = 1e3 * TASKS / rate
    keys = [key for key in later[0] if key.startswith("seconds_") and key != "seconds_step"]
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
            loops = [rate_and_split(run_of(folder, turn, name, rank)) for rank in range(ranks)]
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/glyphs", help="a prepared data set")
    parser.add_argument("--steps", type=int, default=12, help="of each loop, one of which is left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (Path(folder), options.data, options.steps, options.repeats), nprocs=2)
        print()
        rows = summarised(Path(folder), options.repeats)
    print(f"{'':24} {'tasks/s':>8} {'(spread)':>14} {'speed-up':>9} {'efficiency':>11} {'(spread)':>14}")
    for name, row in rows.items():
        spread = "({:.1f}..{:.1f})".format(*row["spread"])
        efficiency = "{:11.0%} {:>14}".format(row["efficiency"], "({:.0%}..{:.0%})".format(*row["efficiency_spread"]))
        reduces = name.startswith("two workers")
        print(
            f"{name:24} {row['tasks_per_second']:8.2f} {spread:>14} {row['speed_up']:8.2f}x{efficiency if reduces else ''}"
        )
    print(f"\n{'ms a step':24}" + "".join(f"{key:>9}" for key in rows["one worker"]["ms"]))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{value:9.1f}" for value in row["ms"].values()))
    if options.json:
        report = {**facts(), "processes": 2, "steps": options.steps, "repeats": options.repeats, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
