"""Which algorithm is best at equal tasks, and which at equal seconds? The same configuration with one switch changed.

python benchmarks/compare_algorithms.py pipelines/configs/glyphs.yaml runs/algorithms --steps 80 --seconds 100 --json algorithms.json

Every algorithm gets the same episodes, network, initial parameters, inner loop, outer optimiser and workers. Nothing is tuned
for any of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ALGORITHMS = ("imaml", "maml", "fomaml", "reptile", "anil", "meta_sgd")


def train(config: Path, run: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of a finished run; one that is there already is not repeated."""
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config), "--run-dir", str(run), *settings]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{run} did not finish")
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def main() -> None:
    """Run, print a table in Markdown and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    alike = [
        "outer.schedule=constant",
        "validate.every=1000000",
        "tracking.mlflow=false",
        f"evaluate.tasks={chosen.tasks}",
    ]
    rows: list[dict[str, Any]] = []
    for kind in chosen.algorithms:
        for what, limit, limits in (
            ("tasks", f"{chosen.steps}-steps", [f"run.steps={chosen.steps}", "run.max_seconds=null"]),
            ("seconds", f"{chosen.seconds:g}-seconds", ["run.steps=1000000", f"run.max_seconds={chosen.seconds}"]),
        ):
            # By its limit, so that a longer run of an earlier table is not taken for this one's.
            done = train(chosen.config, chosen.runs / f"{kind}-{limit}", [f"algorithm.kind={kind}", *alike, *limits])
            keys = ("meta_steps", "seconds", "tasks_per_second", "test_accuracy", "ci95", "untrained_accuracy")
            rows.append({"algorithm": kind, "equal": what, **{key: done[key] for key in keys}})
    print(f"| algorithm | {chosen.steps} meta-steps | seconds | {chosen.seconds:.0f} seconds | meta-steps | tasks/s |")
    print("|---|---|---|---|---|---|")
    for tasks, seconds in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"| {tasks['algorithm']} | {_percent(tasks)} | {tasks['seconds']:.0f} | {_percent(seconds)} | "
            f"{seconds['meta_steps']} | {seconds['tasks_per_second']:.1f} |"
        )
    if chosen.json:
        facts = {name: getattr(chosen, name) for name in ("steps", "seconds", "tasks")}
        chosen.json.write_text(json.dumps({"config": str(chosen.config), **facts, "rows": rows}, indent=1))


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['test_accuracy']:.1f} ± {100 * row['ci95']:.1f} %"


if __name__ == "__main__":
    main()
