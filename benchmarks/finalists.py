"""The best setting of every method at full length, several seeds: who is better at equal tasks, and who at equal seconds?

python benchmarks/operators.py --data data/omniglot --minutes 90 --json operators.json
python benchmarks/finalists.py operators.json --data data/omniglot --json finalists.json --png finalists.png

Settings are those that `operators.py` found, with the same number of trials for every method: that which was best at equal tasks, and
that which was best at equal seconds. Every run is `imaml train` with two workers and a linear schedule; at equal tasks, with the same
number of steps. For equal seconds a method gets as many steps as fit into the time of the implicit one's, by the processor time
that a task cost each when they took turns (`seconds_per_task` of the report), with the schedule stretched over them. That a run's
result does not depend on what else the machine does is what makes this possible.
Accuracies are of `imaml train`'s own test at the end. The same command goes on where it was interrupted; `--from` takes what an
earlier report has of the same settings, steps and seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from meta_gradient import facts

Row = dict[str, Any]

BESIDE = 0.12
"""Where a seed's point is drawn beside that of the next, in widths of a method's column."""


def train(config: Path, run: Path, overrides: list[str]) -> Row:
    """The summary of a finished run; one that is there already is not repeated."""
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config), "--run-dir", str(run), *settings]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{run} did not finish")
    found: Row = json.loads((run / "summary.json").read_text())
    keys = ("meta_steps", "seconds", "tasks_per_second", "test_accuracy", "ci95", "restarts")
    return {key: found[key] for key in keys}


def settings_of(report: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """By method, the cell that was best at equal tasks and that at equal seconds."""
    counts = {method: len(report["stages"].get(method, [])) for method in options.methods}
    if len(set(counts.values())) != 1:
        raise SystemExit(
            f"the methods were not tried as often as each other ({counts}); let operators.py run to its end first"
        )
    found = {}
    for method in options.methods:
        cells = {cell["name"]: cell for cell in report["stages"][method]}
        found[method] = {what: cells[name] for what, name in report["best"][method].items()}
    if not all("seconds_per_task" in cell for best in found.values() for cell in best.values()):
        raise SystemExit("the report has no seconds of a task; let operators.py run with --turns")
    return found


def known(earlier: dict[str, Any], overrides: list[str], steps: int, seeds: int) -> list[Row] | None:
    """The rows of a report that has had the same trained before."""
    for what, methods in earlier.get("equal", {}).items():
        for method, rows in methods.items():
            same = earlier["settings"][method][what] == overrides and len(rows) == seeds
            if same and all(row["meta_steps"] == steps for row in rows):
                return list(rows)
    return None


def spread(rows: list[Row]) -> str:
    """Mean over seeds, the largest interval of one, and the range over seeds."""
    values = [100 * row["test_accuracy"] for row in rows]
    ci95 = 100 * max(row["ci95"] for row in rows)
    return f"{statistics.fmean(values):.1f} ± {ci95:.1f} ({min(values):.1f} to {max(values):.1f})"


def draw(equal: dict[str, dict[str, list[Row]]]) -> Figure:
    """A point for every seed."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (what, methods) in zip(figure.subplots(1, 2, sharey=True), equal.items(), strict=True):
        for place, rows in enumerate(methods.values()):
            accuracy, ci95 = ([100 * row[key] for row in rows] for key in ("test_accuracy", "ci95"))
            beside = [place + BESIDE * (seed - (len(rows) - 1) / 2) for seed in range(len(rows))]
            axes.errorbar(beside, accuracy, ci95, fmt="o", markersize=4, capsize=2)
        axes.set_xticks(range(len(methods)), list(methods), rotation=20)
        axes.set_title(f"equal {what}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, % (95% interval)")
    return figure


def main() -> None:
    """Run, print a table in Markdown, write JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON of operators.py")
    parser.add_argument("--config", type=Path, default=Path("pipelines/configs/omniglot.yaml"))
    parser.add_argument("--data", default="data/omniglot")
    parser.add_argument("--runs", type=Path, default=Path("runs/finalists"))
    parser.add_argument("--methods", nargs="+", default=["imaml", "anil", "fomaml", "reptile", "reference", "maml"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="a.b=c", help="for all methods")
    parser.add_argument("--from", type=Path, dest="earlier", metavar="JSON", help="what --json wrote before")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    earlier = json.loads(options.earlier.read_text()) if options.earlier else {}
    if earlier and earlier["extra"] != options.extra:
        raise SystemExit(f"{options.earlier} was written with --set {earlier['extra']}, not {options.extra}")
    report = json.loads(options.report.read_text())
    methods = settings_of(report, options)

    def runs(method: str, what: str, steps: int) -> list[Row]:
        if found := known(earlier, methods[method][what]["overrides"], steps, options.seeds):
            return found
        alike = [
            f"data.url={options.data}",
            f"run.workers={options.workers}",
            f"run.steps={steps}",
            "run.max_seconds=null",
            "validate.tasks=0",
            "tracking.mlflow=false",
            *options.extra,
        ]
        return [
            train(
                options.config,
                options.runs / f"{method}-{what}-{steps}-{seed}",
                [*alike, *methods[method][what]["overrides"], f"run.seed={seed}"],
            )
            for seed in range(options.seeds)
        ]

    budget = options.steps * methods["imaml"]["seconds"]["seconds_per_task"]
    affordable = {
        method: max(1, round(budget / best["seconds"]["seconds_per_task"])) for method, best in methods.items()
    }
    tasks = {method: runs(method, "tasks", options.steps) for method in methods}
    seconds = {
        method: tasks[method]
        if (best["tasks"], options.steps) == (best["seconds"], affordable[method])
        else runs(method, "seconds", affordable[method])
        for method, best in methods.items()
    }
    equal = {"tasks": tasks, "seconds": seconds}
    print(f"| method | {options.steps} steps | tasks/s | as many seconds | steps |\n|---|---|---|---|---|")
    for method, steps in affordable.items():
        speed = statistics.median(row["tasks_per_second"] for row in tasks[method])
        print(f"| {method} | {spread(tasks[method])} | {speed:.1f} | {spread(seconds[method])} | {steps} |")
    if options.json:
        settings = {
            method: {what: cell["overrides"] for what, cell in best.items()} for method, best in methods.items()
        }
        found = {**facts(), "settings": settings, "steps": affordable, "extra": options.extra, "equal": equal}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        draw(equal).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
