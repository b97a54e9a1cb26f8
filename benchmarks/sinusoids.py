"""Where an inner problem takes many steps: regression on sinusoids, 100 inner steps, against MAML at equal seconds and equal memory.

python benchmarks/sinusoids.py --json sinusoids.json --png sinusoids.png

Ten points of a sine wave of unknown amplitude and phase, a network of 1-40-40-1 (Finn et al. 2017, section 5.1, with SiLU), 25
tasks a meta-step, float32, one thread. Meta-gradients are clipped to a norm of CLIP, and the outer rate falls linearly over the
seconds: without both, long runs of every method went astray in some seeds. Each gets nine short trials (three settings x three
outer rates, `settings` and RATES), of which the one with the lowest error on waves of their own goes on, with three seeds. Seconds
are processor time.

Memory is what a meta-gradient of 1,000 tasks adds to a process that has done one of ten (the kernel's VmHWM, a fresh process each).
MAML, whose memory grows with its inner steps, runs twice: with 100 of them, and with as many as fit into the memory of the implicit
gradient through 100.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from memory import map_blocks_apart, resident
from meta_gradient import facts

from imaml_dist import FOMAML, IMAML, MAML, GradientDescent, MetaLearner
from imaml_dist.algorithms.algorithm import Algorithm
from imaml_dist.algorithms.inner import LBFGS
from imaml_dist.algorithms.linear import Dual
from imaml_dist.algorithms.loss import mean_squared_error
from imaml_dist.models.mlp import MLP
from imaml_dist.tasks.sinusoid import Sinusoids

STEPS = 100
PER_STEP = 25
RATES = (0.01, 0.02, 0.04)
CLIP = 1.0
TESTED, TUNED_ON = (Sinusoids(shots=10, queries=100, seed=seed) for seed in (1 << 20, 1 << 19))
"""Waves that no training draws."""

Make = Callable[[float], Algorithm]


def settings(steps: int) -> dict[str, tuple[Make, tuple[float, ...]]]:
    """By method: the algorithm of a value, and the three values that it is tried with."""
    return {
        "iMAML, 100 of descent": (lambda lam: IMAML(lam, GradientDescent(0.02, STEPS), Dual()), (0.03, 0.1, 0.3)),
        "iMAML, L-BFGS 30": (lambda lam: IMAML(lam, LBFGS(lr=0.02, steps=30), Dual()), (0.03, 0.1, 0.3)),
        "MAML, 100 of descent": (lambda lr: MAML(GradientDescent(lr, STEPS)), (0.005, 0.01, 0.02)),
        "MAML, equal memory": (lambda lr: MAML(GradientDescent(lr, steps)), (0.01, 0.02, 0.04)),
        "first-order MAML, 100": (lambda lr: FOMAML(GradientDescent(lr, STEPS)), (0.01, 0.02, 0.04)),
    }


def learner(algorithm: Algorithm, seed: int) -> MetaLearner:
    """With the initial network of a seed."""
    torch.manual_seed(seed)
    return MetaLearner(MLP((1, 1, 1), 1, (40, 40)), algorithm, mean_squared_error, "vmap")


def error(subject: MetaLearner, source: Sinusoids, tasks: int) -> tuple[float, float, float]:
    """Mean squared error over unseen waves, its 95% interval, and the median stationarity of their inner solves."""
    episodes = source.episodes(0, range(tasks))
    inner = subject.adapt_parameters(episodes.support_x, episodes.support_y)
    with torch.no_grad():
        found = (subject.functional.predict(inner.params, episodes.query_x) - episodes.query_y).square().mean((1, 2))
    return float(found.mean()), float(1.96 * found.std() / tasks**0.5), float(inner.stationarity.median())


def train(method: str, value: float, rate: float, seed: int, seconds: float, points: int, equal: int) -> dict[str, Any]:
    """Meta-train for so many seconds, tested at so many points."""
    torch.set_num_threads(1)
    subject, source = learner(settings(equal)[method][0](value), seed), Sinusoids(seed=seed)
    optimiser = torch.optim.Adam(subject.parameters(), lr=rate)
    subject.task_gradients(source.episodes(1 << 19, range(PER_STEP)))  # what a first call tries
    used, steps = 0.0, 0
    found: list[dict[str, float]] = []
    while used < seconds:
        began = time.process_time()
        optimiser.param_groups[0]["lr"] = rate * (1 - used / seconds)
        optimiser.zero_grad()
        subject.backward(source.episodes(steps, range(PER_STEP)))
        torch.nn.utils.clip_grad_norm_(subject.parameters(), CLIP)
        optimiser.step()
        used, steps = used + time.process_time() - began, steps + 1
        if used >= seconds * (len(found) + 1) / points:
            mean, ci95, stationarity = error(subject, *((TUNED_ON, 200) if points == 1 else (TESTED, 1000)))
            place = {"seconds": used, "tasks": float(steps * PER_STEP)}
            found.append({**place, "error": mean, "ci95": ci95, "stationarity": stationarity})
    return {"method": method, "value": value, "rate": rate, "seed": seed, "points": found}


def added(algorithm: Algorithm) -> float:
    """MB that the meta-gradients of 1,000 tasks add to this process."""
    torch.set_num_threads(1)
    map_blocks_apart()
    subject = learner(algorithm, 0)
    subject.task_gradients(Sinusoids().episodes(0, range(10)))
    episodes = Sinusoids().episodes(0, range(1000))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is what is resident now
    base = resident("VmHWM")
    subject.task_gradients(episodes)
    return resident("VmHWM") - base


def memory_of(method: str, steps: int) -> float:
    """`added`, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--cell", method, str(steps)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{method} failed:\n{done.stderr}")
    return float(done.stdout)


def fitting(allowed: float) -> tuple[int, float]:
    """Most inner steps with which MAML needs no more memory, at least one, and what it needs."""
    steps, needed = 1, memory_of("MAML, equal memory", 1)
    while steps < STEPS and (more := memory_of("MAML, equal memory", steps + 1)) <= allowed:
        steps, needed = steps + 1, more
    return steps, needed


def at_tasks(points: list[dict[str, float]], tasks: float) -> float:
    """The error at so many tasks, on the line between the points around it; the first one's before it."""
    for before, after in itertools.pairwise(points):
        if before["tasks"] < tasks <= after["tasks"]:
            share = (tasks - before["tasks"]) / (after["tasks"] - before["tasks"])
            return (1 - share) * before["error"] + share * after["error"]
    return points[0]["error"]


def final_error(run: dict[str, Any]) -> float:
    """At the last point; infinite where it is not a number, which no comparison would put last."""
    found = float(run["points"][-1]["error"])
    return math.inf if math.isnan(found) else found


def draw(runs: dict[str, list[dict[str, Any]]], memory: dict[str, float]) -> Figure:
    """Error over seconds and over tasks, a line a seed; above 1, adaptation blew up on some waves."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("seconds", "seconds of one core"), ("tasks", "tasks trained on")),
        strict=True,
    ):
        for number, (method, seeds) in enumerate(runs.items()):
            for run in seeds:
                x, y = ([point[name] for point in run["points"]] for name in (key, "error"))
                name = f"{method} ({memory[method]:.0f} MB)" if run is seeds[0] else None
                axes.plot(x, y, color=f"C{number}", marker="o", markersize=3, label=name)
        axes.set(xlabel=label, yscale="log", xscale="linear" if key == "seconds" else "log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set(ylabel="mean squared error on unseen waves", ylim=(0.02, 1.0))
    figure.axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure memory, tune, train, print, write JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial-seconds", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        make, values = settings(int(options.cell[1]))[options.cell[0]]
        return print(added(make(values[0])))
    memory = {method: memory_of(method, 1) for method in settings(1) if method != "MAML, equal memory"}
    equal, memory["MAML, equal memory"] = fitting(memory["iMAML, 100 of descent"])
    print(f"MAML with {equal} inner steps needs {memory['MAML, equal memory']:.0f} MB; MB of all: {memory}")

    trials = [(m, value, rate) for m, (_, values) in settings(equal).items() for value in values for rate in RATES]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        short = partial(train, seed=0, seconds=options.trial_seconds, points=1, equal=equal)
        tried = [found.result() for found in [pool.submit(short, *trial) for trial in trials]]
        best = {m: min((t for t in tried if t["method"] == m), key=final_error) for m in memory}
        chosen = [
            (m, best[m]["value"], best[m]["rate"], seed) for m in settings(equal) for seed in range(options.seeds)
        ]
        full = partial(train, seconds=options.seconds, points=options.points, equal=equal)
        done = [found.result() for found in [pool.submit(full, *one) for one in chosen]]
    runs = {m: [run for run in done if run["method"] == m] for m in settings(equal)}
    common = min(run["points"][-1]["tasks"] for run in done)

    print(
        f"| method | MB for 1,000 tasks | tasks/s | error after {options.seconds:g} s | after {common:.0f} tasks |\n"
        + "|---" * 5
        + "|"
    )
    for method, seeds in runs.items():
        last = [run["points"][-1] for run in seeds]
        errors = ", ".join(f"{p['error']:.3f} ± {p['ci95']:.3f}" for p in last)
        alike = ", ".join(f"{at_tasks(run['points'], common):.3f}" for run in seeds)
        speed = statistics.median(p["tasks"] / p["seconds"] for p in last)
        print(f"| {method} | {memory[method]:.0f} | {speed:.0f} | {errors} | {alike} |")
    if options.json:
        found = {**facts(), "steps_equal_memory": equal, "memory_mb": memory, "trials": tried, "runs": runs}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        draw(runs, memory).savefig(options.png, dpi=110)
    return None


if __name__ == "__main__":
    main()
