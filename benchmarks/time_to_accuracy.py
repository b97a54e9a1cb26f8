"""How many seconds of training does each method need to a test accuracy on Omniglot?

imaml prepare omniglot --out data/omniglot --source path/to/archives
python benchmarks/time_to_accuracy.py --data data/omniglot --minutes 20 --json time.json --png time.png

Every method is trained by `imaml train` with two workers: ours as it is shipped, the others with the settings that nine trials each
of `operators.py` found best at equal tasks (METHODS). The same episodes, network and initial parameters for all. Steps are the
configuration's, or as many as fit into --minutes by the pace of a short run before it, so that every method's schedule comes to its
end. There is no validation; checkpoints are kept, and tested afterwards on the same test tasks.

Seconds to an accuracy: those of the training loop, without the start of the workers, at the first checkpoint whose test accuracy
reaches it. To find it, checkpoints some 25% apart are tested, then all between the last one below and the first one above. The
same command goes on where it was interrupted; what is trained and tested is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from meta_gradient import facts
from operators_cells import trials

from imaml_dist.config.load import build_config, read_mapping
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process
from imaml_dist.training import checkpoints
from imaml_dist.training.evaluation import evaluate
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory

ANIL = trials("anil")["anil, 16 of 0.1, rate 0.003"]

METHODS = {
    "imaml": [],
    "anil": ANIL,
    "anil-clip": [*ANIL, "outer.clip=1"],  # without it a longer run may diverge
    "fomaml": trials("fomaml")["fomaml, 16 of 0.1, rate 0.003"],
    "maml": trials("maml")["maml, 16 of 0.1, rate 0.003"],
}
"""What each changes in the configuration; the baselines' are the best of their trials in docs/operators.json."""

PACED = 20
"""Steps of the short run; the latter half of them tells the pace."""

SPACING = 1.25

Points = dict[int, dict[str, float]]
"""By step: seconds of training, test accuracy and its 95% interval."""


def train(config: Path, run: Path, overrides: list[str]) -> None:
    """Train to the end, or see that it is done."""
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines.cli", "train", str(config), "--run-dir", str(run), *settings]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{run} did not finish")


def fitting(config: Path, run: Path, overrides: list[str], minutes: float) -> int:
    """Steps that fit, at most the configuration's."""
    pace = run.with_name(f"{run.name}-pace")
    train(config, pace, [*overrides, f"run.steps={PACED}"])
    lines = (pace / "metrics.jsonl").read_text().splitlines()
    late = [json.loads(line)["seconds_step"] for line in lines[PACED // 2 :]]
    return min(build_config(read_mapping(config), overrides).run.steps, round(60 * minutes / statistics.fmean(late)))


def tested(run: Path, tasks: int, step: int) -> tuple[int, dict[str, float]]:
    """A checkpoint's point on the curve."""
    directory = RunDirectory(run)
    config = directory.config()
    prepare_process(config)
    source = make_source(config, open_dataset(config), "test")
    learner = make_learner(config, source.image_shape)
    tensors, state = checkpoints.load(checkpoints.path_of(directory.checkpoints, step))
    meta_parameters(learner).load(tensors)
    found = evaluate(learner, source, tasks, device=config.run.device)
    return step, {"seconds": state["seconds"], "accuracy": found.mean, "ci95": found.ci95}


def coarse(steps: list[int]) -> list[int]:
    """The first, the last, and those between that are some way apart."""
    chosen = steps[:1]
    for step in steps:
        if step >= SPACING * chosen[-1] or (step == steps[-1] and step != chosen[-1]):
            chosen.append(step)
    return chosen


def first_above(points: Points, target: float) -> int | None:
    """The first tested checkpoint that reaches a target."""
    return next((step for step in sorted(points) if points[step]["accuracy"] >= target), None)


def curve(run: Path, tasks: int, targets: list[float], workers: int) -> Points:
    """All tested checkpoints of a run, kept in a file beside it."""
    steps = checkpoints.steps(RunDirectory(run).checkpoints)
    steps.sort()
    file = run.with_name(f"{run.name}-{tasks}-tasks.json")
    points: Points = {int(k): v for k, v in json.loads(file.read_text()).items()} if file.exists() else {}
    wanted = coarse(steps)
    # Not by fork, which torch's threads do not survive.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        while missing := [step for step in wanted if step not in points]:
            for step, point in pool.map(partial(tested, run, tasks), missing):
                points[step] = point
                file.write_text(json.dumps(points, indent=1) + "\n")
                print(f"{run.name} step {step}: {point['seconds']:.0f} s, {point['accuracy']:.2%}", flush=True)
            wanted = []
            for target in targets:
                above = first_above(points, target)
                below = max((step for step in points if above and step < above), default=0)
                wanted += [step for step in steps if above and below < step < above]
    return dict(sorted(points.items()))


def draw(curves: dict[str, Points], targets: list[float]) -> Figure:
    """Accuracy over seconds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        x, y, e = ([point[key] for point in points.values()] for key in ("seconds", "accuracy", "ci95"))
        percent = [100 * v for v in y]
        axes.errorbar(x, percent, [100 * v for v in e], label=name, marker="o", markersize=3, capsize=2)
    for target in targets:
        axes.axhline(100 * target, color="grey", linewidth=0.6, linestyle=":")
    axes.set(xlabel="seconds of training, two cores", ylabel="test accuracy, % (95% interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Train, test, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pipelines/configs/omniglot.yaml"))
    parser.add_argument("--data", default="data/omniglot", help="what imaml prepare has written")
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-accuracy"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=int, default=10, help="meta-steps between checkpoints")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.90, 0.94, 0.95])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="a.b=c", help="for all methods")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    alike = [
        f"data.url={options.data}",
        "run.max_seconds=null",
        f"run.workers={options.workers}",
        f"run.checkpoint_every={options.every}",
        "run.keep=1000000",
        "validate.tasks=0",
        "evaluate.tasks=0",
        "tracking.mlflow=false",
        *options.extra,
    ]
    curves: dict[str, Points] = {}
    rows: dict[str, dict[str, Any]] = {}
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        run = options.runs / name
        settings = [*alike, *METHODS[name]]
        steps = fitting(options.config, run, settings, options.minutes)
        train(options.config, run, [*settings, f"run.steps={steps}"])
        curves[name] = curve(run, options.tasks, options.targets, options.workers)
        summary = json.loads((run / "summary.json").read_text())
        keys = ("meta_steps", "seconds", "tasks_per_second", "restarts")
        rows[name] = {key: summary[key] for key in keys} | {"points": curves[name], "settings": METHODS[name]}
        for target in options.targets:
            step = first_above(curves[name], target)
            rows[name][f"seconds_to_{target:g}"] = None if step is None else curves[name][step]["seconds"]

    print(f"\n{'seconds to':12}" + "".join(f"{target:>8.0%}" for target in options.targets), end="")
    print(f" {'at the end':>14} {'seconds':>8} {'steps':>6} {'tasks/s':>8}")
    for name, row in rows.items():
        reached = (row[f"seconds_to_{target:g}"] for target in options.targets)
        cells = "".join(f"{'-' if seconds is None else round(seconds):>8}" for seconds in reached)
        last = list(curves[name].values())[-1]
        end = f"{100 * last['accuracy']:.1f} ± {100 * last['ci95']:.1f} %"
        print(f"{name:12}{cells} {end:>14} {row['seconds']:8.0f} {row['meta_steps']:6} {row['tasks_per_second']:8.1f}")
    if options.json:
        report = {**facts(), "workers": options.workers, "tasks": options.tasks, "extra": options.extra, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.png:
        draw(curves, options.targets).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
