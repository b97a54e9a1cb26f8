"""Which run learns faster? Validation accuracy of finished runs over seconds of training and over tasks seen.

python benchmarks/compare_runs.py runs/omniglot runs/omniglot-fomaml --png docs/images/omniglot-comparison.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def curve(run: Path) -> dict[str, Any]:
    """Facts of a run, and its validations as (seconds, tasks, accuracy, ci95)."""
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    if len(starts) != 1:
        raise SystemExit(f"{run} was started {len(starts)} times; compare undisturbed runs")
    began, per_step = starts[0]["time"], summary["ledger"]["tasks"] // summary["meta_steps"]
    points = [
        (r["time"] - began, (r["step"] + 1) * per_step, r["val_accuracy"], r["val_ci95"])
        for r in records
        if "val_accuracy" in r
    ]
    keys = (
        "algorithm",
        "test_accuracy",
        "ci95",
        "meta_steps",
        "seconds",
        "tasks_per_second",
        "world_size",
        "dataset",
        "way",
        "shot",
    )
    return {"run": run.name, **{k: summary[k] for k in keys}, "validation": points}


def draw(curves: list[dict[str, Any]]) -> Figure:
    """Two panels: at equal seconds, at equal tasks."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("seconds of training", "tasks seen"), strict=True
    ):
        for c in curves:
            x, y, e = ([p[i] for p in c["validation"]] for i in (column, 2, 3))
            axes.errorbar(
                x, [100 * v for v in y], [100 * v for v in e], label=c["run"], marker="o", markersize=3, capsize=2
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("validation accuracy, % (95% interval)")
    return figure


def main() -> None:
    """Print a table, and write JSON and a picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    curves = [curve(run) for run in args.runs]
    for c in curves:
        print(
            f"{c['run']:24} {c['algorithm']:8} test {100 * c['test_accuracy']:.2f} +- {100 * c['ci95']:.2f} % after "
            f"{c['meta_steps']} steps, {c['seconds']:.0f} s, {c['tasks_per_second']:.1f} tasks/s"
        )
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1) + "\n")
    if args.png:
        draw(curves).savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
