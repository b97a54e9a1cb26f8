"""What does a smooth network cost beside the rectified one? Its accuracy is one of the questions of `operators.py`.

python benchmarks/activations.py --json activations.json

The meta-gradient of four tasks, 5-way 1-shot, as in `meta_gradient.py`: Conv-4, random images, 16 inner steps, 5 steps of
conjugate gradient on the Hessian, float32, one thread, our own kernels where there is a compiler. All activations take turns, in an
order that changes from turn to turn, and ratios are medians of pairs from the same turn, with their quartiles. Seconds are those of
the processor, so that waiting for it does not count.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from meta_gradient import CG_STEPS, LAM, LR, facts, ours, work

from imaml_dist.kernels import native
from imaml_dist.kernels.memory import keep_freed_memory
from imaml_dist.models.activation import Activation

NAMES = ("relu", "silu", "gelu", "softplus")


def cost(repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of a meta-gradient of four tasks, and the ratio to the rectified network's."""
    running = {}
    for name in NAMES:
        model, episodes = work("5w1s", torch.float32, 4)
        for block in model.get_submodule("blocks").children():
            block.get_submodule("1").activation = Activation(name)
        compute = ours("native" if native.usable() else "vmap", CG_STEPS, LAM, LR)
        compute(model, episodes)
        running[name] = compute, model, episodes
    turns: list[dict[str, float]] = []
    for number in range(repeats):
        turn = {}
        for name in NAMES if number % 2 else reversed(NAMES):
            compute, model, episodes = running[name]
            began = time.process_time()
            compute(model, episodes)
            turn[name] = time.process_time() - began
        turns.append(turn)
    found = {}
    for name in NAMES:
        low, middle, high = statistics.quantiles((t[name] / t["relu"] for t in turns), n=4, method="inclusive")
        seconds = statistics.median(t[name] for t in turns)
        found[name] = {"seconds": seconds, "ratio": middle, "ratio_quartiles": [low, high]}
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = cost(options.repeats)
    print("activation  seconds   ratio  (quartiles)")
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        print(f"{name:10} {row['seconds']:8.3f} {row['ratio']:7.3f}  ({low:.3f} to {high:.3f})", flush=True)
    if options.json:
        chosen = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({**facts(), **chosen, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
