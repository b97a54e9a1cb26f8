"""What makes the implicit meta-gradient win: operator, lambda, inner solver, activation, budget; against methods tuned alike.

imaml prepare omniglot --out data/omniglot --source path/to/archives
python benchmarks/operators.py --data data/omniglot --minutes 90 --json operators.json --png operators.png
python benchmarks/operators.py --data data/omniglot --set data.way=20 --tasks 240 --every 120 --out runs/operators20 --json operators20.json

Every cell meta-trains Conv-4 in one process of one thread, from the same initial network on the same episodes, until it has used
both `--tasks` tasks and `--seconds` seconds of processor time; the outer rate is constant and what is tested are the averaged
iterates (`AVERAGE` steps). Accuracy is that on tasks of the val split, the same for all cells, at equal tasks and, by a line
between the points before and after, at equal seconds. Every method gets nine trials (its own settings x outer rates); the best
are told for each of the two comparisons, and the implicit one with the best mean of them is changed in one way after the other.
Where it is interrupted or its minutes are over, the same command goes on; cells that are done are read. Before one is chosen, and
at the end, cells take turns with meta-steps at the network that they ended with, and seconds are counted with the processor time
that a task costs there: what else the machine did while they were trained matters little then. Trials are unlike in one thing:
the configuration that all begin with was made for the implicit method, whose head adapts alone. ANIL, which differentiates
through the loop of the head alone, tells what of it is due to that.

Of every cell: stationarity and linear residual, the cosine of the meta-gradient to the first-order one, norm(phi - theta), the
outcomes of the linear solves (means over the last 20 steps); and, in float64 on `PROBED` val tasks at the end, the smallest
eigenvalue of H + Lambda (of the parameters that adapt) as 50 steps of Lanczos see it.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from matplotlib.figure import Figure
from meta_gradient import facts
from operators_cells import FACTORS, SETTINGS, trials
from operators_run import Cell, asked, in_turns, place, run_cell

from imaml_dist.errors import ImamlError

EQUAL = ("tasks", "seconds")

SHORTLIST, CLOSELY = 3, 4
"""Of a method, how many cells of each comparison take turns again before the best is named, and in how many times the turns of all: what
fits into equal seconds hangs on it."""


def at(points: list[dict[str, float]], key: str, value: float) -> float | None:
    """Accuracy where `key` is `value`, on the line between the points around it; the first one's where it comes before all.

    The latter favours slow methods, whose first test comes later than they are compared at.
    """
    if points and value <= points[0][key]:
        return points[0]["accuracy"]
    for before, after in itertools.pairwise(points):
        if before[key] < value <= after[key]:
            share = (value - before[key]) / (after[key] - before[key])
            return after["accuracy"] if share == 1.0 else (1 - share) * before["accuracy"] + share * after["accuracy"]
    return None


def at_equal(cell: Cell, what: str, options: argparse.Namespace) -> float:
    """Accuracy at as many tasks, or seconds, as the options ask for; minus infinity where it has not come that far."""
    found = at(cell["points"], what, getattr(options, what))
    return -math.inf if found is None else found


def run_stage(options: argparse.Namespace, cells: dict[str, list[str]], deadline: float) -> list[Cell]:
    """All cells that are done or still fit, in order; None of those that did not fit."""
    done: dict[str, Cell] = {}
    missing = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, overrides in cells.items():
        file = place(options, name)
        found = json.loads(file.read_text()) if file.exists() else {}
        if found.get("overrides") == overrides and found.get("asked") == asked(options):
            done[name] = found
        else:
            missing[name] = (overrides, file)
    # Not by fork, which torch's threads do not survive; one cell a process, for memory that was freed is not given back.
    with ProcessPoolExecutor(options.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting: dict[Future[Cell], str] = {}
        queue = iter(missing.items())
        while True:
            while len(waiting) < options.processes and time.monotonic() < deadline and (one := next(queue, None)):
                name, (overrides, file) = one
                waiting[pool.submit(run_cell, options, name, overrides, file)] = name
            if not waiting:
                break
            finished = next(as_completed(waiting))
            name = waiting.pop(finished)
            try:
                done[name] = finished.result()
            except ImamlError as error:  # the next start of the command tries it again
                print(f"{name}: {error}", flush=True)
                continue
            print(line(done[name], options), flush=True)
    return [done[name] for name in cells if name in done]


def score(cell: Cell, options: argparse.Namespace) -> float:
    """Accuracy at equal tasks and at equal seconds, their mean; minus infinity where one is missing."""
    return statistics.fmean(at_equal(cell, what, options) for what in EQUAL)


def shortlist(cells: list[Cell], options: argparse.Namespace) -> list[Cell]:
    """The best of a method's trials in either comparison."""
    return distinct(sorted(cells, key=lambda c: -at_equal(c, what, options))[:SHORTLIST] for what in EQUAL)


def finalists(cells: list[Cell], options: argparse.Namespace) -> dict[str, Cell]:
    """The best of a method's trials at equal tasks, and that at equal seconds: they need not be the same."""
    return {what: max(cells, key=lambda c: at_equal(c, what, options)) for what in EQUAL}


def distinct(groups: Iterable[Iterable[Cell]]) -> list[Cell]:
    """Every cell once."""
    return list({cell["name"]: cell for cells in groups for cell in cells}.values())


def line(cell: Cell, options: argparse.Namespace) -> str:
    """A row of the table."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}" if math.isfinite(value) else "-"

    def number(key: str, form: str = ".2f") -> str:
        return format(cell[key], form) if key in cell and not math.isnan(cell[key]) else "-"

    ritz = cell.get("ritz")
    positive = "-" if ritz is None else f"{sum(r > 0 for r in ritz)}/{len(ritz)}"
    lowest = "-" if ritz is None else f"{statistics.median(ritz):.3f}"
    ci95 = max(p["ci95"] for p in cell["points"])
    columns = (
        *(percent(at_equal(cell, what, options)) for what in EQUAL),
        f"{100 * ci95:.1f}",
        f"{cell['tasks_per_second']:.1f}",
        number("stationarity", ".3f"),
        number("cg_residual"),
        lowest,
        positive,
        number("cg_negative_curvature", ".1f"),
        number("cosine"),
        number("distance"),
    )
    return f"| {cell['name']} | " + " | ".join(columns) + " |"


def table(title: str, cells: list[Cell], options: argparse.Namespace) -> str:
    """In Markdown, the best first."""
    heads = (
        f"{title}, val accuracy, %",
        f"{options.tasks} tasks",
        f"{options.seconds:g} s",
        "±",
        "tasks/s",
        "stationarity",
        "residual",
        "lowest Ritz",
        "> 0",
        "neg. curv. of 16",
        "cosine to v",
        "distance",
    )
    rows = [line(cell, options) for cell in sorted(cells, key=lambda c: -score(c, options))]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows])


def draw(chosen: dict[str, dict[str, Cell]]) -> Figure:
    """Accuracy over tasks and over seconds, of what was best there."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), EQUAL, strict=True):
        for cell in (found[what] for found in chosen.values()):
            x, y, e = ([p[name] for p in cell["points"]] for name in (what, "accuracy", "ci95"))
            percent = [100 * v for v in y]
            axes.errorbar(x, percent, [100 * v for v in e], label=cell["name"], marker="o", markersize=3, capsize=2)
        axes.set(xlabel=what if what == "tasks" else "seconds of one core", ylabel="val accuracy, % (95% interval)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title=f"best of nine at equal {what}", title_fontsize=7)
    return figure


def main() -> None:
    """Run what is missing, print tables, write JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pipelines/configs/omniglot.yaml"))
    parser.add_argument("--data", default="data/omniglot", help="what imaml prepare has written")
    parser.add_argument("--out", type=Path, default=Path("runs/operators"), help="a JSON file for every cell")
    parser.add_argument("--minutes", type=float, default=90.0, help="no cell is begun after them")
    parser.add_argument("--tasks", type=int, default=1600)
    parser.add_argument("--seconds", type=float, default=50.0, help="of one core's time")
    parser.add_argument("--every", type=int, default=800, help="tasks between two tests")
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument(
        "--turns", type=int, default=5, help="in which cells are timed at the end; 0 keeps processor time"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="a.b=c", help="for all cells")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    stages = {method: run_stage(options, trials(method), deadline) for method in SETTINGS}
    methods = {method: cells for method, cells in stages.items() if cells}
    if "imaml" in methods:
        in_turns(options, stages["imaml"], options.turns)
        best = max(stages["imaml"], key=lambda c: score(c, options))
        changed = {f"imaml, {name}": [*best["overrides"], *change] for name, change in FACTORS.items()}
        stages["changes"] = [best, *run_stage(options, changed, deadline)]
    in_turns(options, distinct(stages.values()), options.turns)
    in_turns(options, distinct(shortlist(cells, options) for cells in methods.values()), CLOSELY * options.turns)
    chosen = {method: finalists(cells, options) for method, cells in methods.items()}
    for title, cells in stages.items():
        print(f"\n{table(title, cells, options)}")
    if options.json:
        names = {method: {what: cell["name"] for what, cell in found.items()} for method, found in chosen.items()}
        report = {**facts(), **asked(options), "best": names, "stages": stages}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.png:
        draw(chosen).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
