"""What does an accurate meta-gradient cost: error against FLOPs and seconds, for every linear and every inner solver?

python benchmarks/cost_of_accuracy.py --tasks 4 --repeats 5 --json cost.json --png cost.png

A small network of tanh convolutions in float64, whose inner problem Newton's method solves to a stationarity below 1e-10, so that
the truth is known: the dense matrix, formed and solved. Linear solvers start from there, each with the Hessian and with the
Gauss-Newton matrix and judged by the truth of its own matrix; how far apart the two truths are is said. Inner solvers are judged
by the same truths: what remains when the linear system is solved to the end at the phi that they reach.

FLOPs are those of convolutions and matrix products as torch counts them, with torch's own kernels; those of the linear solvers
include the query gradient and the linearisation. Seconds are medians of turns that all solvers take, one thread. A budget counts
products with the matrix (the Nystrom preconditioner takes half of it); a solver that checks its residual pays for that product
too. Errors are means over tasks.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from meta_gradient import facts
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imaml_dist import (
    ConjugateGradient,
    Direct,
    Dual,
    FunctionalModel,
    GradientDescent,
    Minres,
    Momentum,
    Neumann,
    NewtonCG,
    Nystrom,
    ScalarProximal,
    cross_entropy,
    implicit_meta_gradient,
)
from imaml_dist.algorithms.inner import InnerSolver
from imaml_dist.algorithms.linear import LinearSolver
from imaml_dist.algorithms.problem import Operator, Samples, TaskProblem

WAY, SHOT, QUERY, CHANNELS, LR = 5, 1, 5, 8, 0.1
LAM = 0.5
"""Strong enough that all inner solvers end at the same minimum."""

BUDGETS = (1, 2, 5, 10, 20, 50, 100)
STATIONARY = 1e-10
OPERATORS: dict[Operator, str] = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}

INNER: dict[str, tuple[Callable[[int], InnerSolver], tuple[int, ...]]] = {
    "gradient descent": (lambda steps: GradientDescent(LR, steps), (1, 4, 16, 64, 256, 1024)),
    "momentum": (lambda steps: Momentum(LR, steps), (1, 4, 16, 64, 256, 1024)),
    "Newton-CG, Gauss-Newton": (lambda steps: NewtonCG(steps), (1, 2, 4, 8, 16, 32)),
    "Newton-CG, Hessian": (lambda steps: NewtonCG(steps, 20, operator="hessian"), (1, 2, 4, 8, 16, 32)),
}
"""How it is made for a number of steps, and which numbers."""


def network() -> nn.Module:
    """Four convolutions of stride 2 and a linear layer; without batch statistics and kinks, so that the minimum is a clean one."""
    torch.manual_seed(0)
    widths = (1, *[CHANNELS] * 4)
    blocks = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * CHANNELS, WAY)).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter, nn.init.calculate_gain("tanh"))
    return model


def tasks(count: int) -> list[TaskProblem]:
    """Every class is an image; its samples are noisy copies."""
    functional = FunctionalModel(network())
    theta, labels = functional.parameters()[None], torch.arange(WAY)

    def samples(prototypes: Tensor, each: int) -> Samples:
        x = prototypes.repeat(each, 1, 1, 1)
        return Samples((x + 0.5 * torch.randn_like(x))[None], labels.repeat(each)[None])

    problems = []
    for seed in range(count):
        torch.manual_seed(seed)
        prototypes = torch.rand(WAY, 1, 28, 28, dtype=torch.float64)
        support, query = samples(prototypes, SHOT), samples(prototypes, QUERY)
        problems.append(TaskProblem(functional, cross_entropy, theta, support, query))
    return problems


def meta_gradient(problem: TaskProblem, phi: Tensor, solver: LinearSolver) -> Tensor:
    """What `solver` makes of a task adapted to phi."""
    return implicit_meta_gradient(
        problem.support_loss,
        problem.query_loss,
        phi,
        problem.anchor,
        proximal=ScalarProximal(LAM),
        solve=solver.solve,
        curvature=problem.gauss_newton(phi) if solver.operator == "gauss_newton" else None,
        damping=solver.damping,
    ).gradient


def solvers(operator: Operator, budget: int) -> dict[str, LinearSolver]:
    """Those that can spend this number of products."""
    half = budget // 2
    found: dict[str, LinearSolver] = {
        "CG": ConjugateGradient(budget, operator),
        "MINRES": Minres(budget, operator),
        "Neumann": Neumann(budget, operator),
        "Nystrom": Nystrom(budget, operator),
    }
    if half:
        found["CG, Nystrom preconditioner"] = ConjugateGradient(
            budget - half, operator, preconditioner="nystrom", rank=half
        )
    return found


def flops(compute: Callable[[], Any]) -> int:
    """Of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())


def timed(compute: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative error."""
    return float((found - truth).norm() / truth.norm())


def in_turns(rows: list[dict[str, Any]], computations: list[Callable[[], Any]], repeats: int) -> None:
    """Add to each row what its computation costs."""
    turns = [[timed(compute) for compute in computations] for _ in range(repeats)]
    for row, compute, seconds in zip(rows, computations, zip(*turns, strict=True), strict=True):
        row["flops"] = flops(compute)
        row["seconds"] = statistics.median(seconds)
        row["spread"] = [min(seconds), max(seconds)]


def minimum(problem: TaskProblem) -> Tensor:
    """phi at which the inner problem is solved."""
    exact = NewtonCG(steps=200, cg_iterations=200, tolerance=0.01 * STATIONARY, operator="hessian")
    found = exact.solve(problem, ScalarProximal(LAM))
    if not float(found.stationarity) < STATIONARY:
        raise SystemExit(
            f"the inner problem ended at a stationarity of {float(found.stationarity):.0e}; there is no truth"
        )
    return found.params


def linear(
    at: list[tuple[TaskProblem, Tensor]], operator: Operator, budgets: list[int], repeats: int
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Error and cost of every linear solver at every budget, and the truths."""
    dense = Direct(operator)
    truths = [meta_gradient(problem, phi, dense) for problem, phi in at]
    chosen: list[tuple[str, int | None, LinearSolver]] = [
        (name, budget, solver) for budget in budgets for name, solver in solvers(operator, budget).items()
    ]
    if operator == "gauss_newton":
        chosen.append(("dual", None, Dual()))
    chosen.append(("direct", at[0][1].shape[1], dense))
    rows = []
    for name, products, solver in chosen:
        errors = [distance(meta_gradient(*task, solver), truth) for task, truth in zip(at, truths, strict=True)]
        row = {"solver": name, "operator": operator, "products": products}
        rows.append(row | {"error": statistics.fmean(errors), "errors": errors})
    in_turns(rows, [partial(meta_gradient, *at[0], solver) for _, _, solver in chosen], repeats)
    return rows, truths


def inner(
    problems: list[TaskProblem], truths: dict[Operator, list[Tensor]], most: int, repeats: int
) -> list[dict[str, Any]]:
    """Error, by operator, and cost of every inner solver at every number of steps."""
    # Away from the minimum the Hessian may be indefinite, which conjugate gradient could not solve.
    minres = Minres(max_iterations=problems[0].anchor.shape[1], rtol=1e-10)
    to_the_end: dict[Operator, LinearSolver] = {"hessian": minres, "gauss_newton": Dual()}
    chosen = [
        (name, steps, make(steps)) for name, (make, all_steps) in INNER.items() for steps in all_steps if steps <= most
    ]
    proximal, rows = ScalarProximal(LAM), []
    for name, steps, solver in chosen:
        solutions = [solver.solve(problem, proximal) for problem in problems]
        stationarity = statistics.geometric_mean(float(solution.stationarity) for solution in solutions)
        row = {"solver": name, "steps": steps, "stationarity": stationarity}
        for operator, expected in truths.items():
            errors = [
                distance(meta_gradient(problem, solution.params, to_the_end[operator]), truth)
                for problem, solution, truth in zip(problems, solutions, expected, strict=True)
            ]
            row[operator] = statistics.fmean(errors)
        rows.append(row)
    in_turns(rows, [partial(solver.solve, problems[0], proximal) for _, _, solver in chosen], repeats)
    return rows


def table(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Rows by solver; `columns` are formats of keys."""
    print(f"\n{title:28}" + "".join(f"{key:>13}" for key in columns) + f"{'MFLOP':>9} {'ms':>8} {'(spread)':>18}")
    for row in sorted(rows, key=lambda row: row["solver"]):
        cells = "".join(f"{'-' if row[key] is None else format(row[key], form):>13}" for key, form in columns.items())
        low, high = (1e3 * seconds for seconds in row["spread"])
        cost = f"{row['flops'] / 1e6:9.1f} {1e3 * row['seconds']:8.1f} {f'({low:.1f}..{high:.1f})':>18}"
        print(f"{row['solver']:28}{cells}{cost}")


def draw(panels: dict[str, tuple[list[dict[str, Any]], str]]) -> Figure:
    """Panels of error over FLOPs: rows, and the key of their error."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, (title, (rows, key)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in sorted({row["solver"] for row in rows} - {"direct"}):  # which is the truth
            curve = [row for row in rows if row["solver"] == name]
            axes.plot(
                [row["flops"] for row in curve], [row[key] for row in curve], label=name, marker="o", markersize=3
            )
        axes.set(title=title, xlabel="FLOPs a task", ylabel="relative error", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.xaxis.set_minor_formatter("")  # a panel is narrower than two decades
        axes.legend(fontsize="small", loc="center left")
    return figure


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="products with the matrix")
    parser.add_argument("--steps", type=int, default=1024, help="of the inner solvers, at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems = tasks(options.tasks)
    at = [(problem, minimum(problem)) for problem in problems]
    size = at[0][1].shape[1]
    report: dict[str, Any] = {**facts(), "parameters": size, "lam": LAM, "tasks": options.tasks}
    truths: dict[Operator, list[Tensor]] = {}
    for operator in OPERATORS:
        report[operator], truths[operator] = linear(at, operator, options.budgets, options.repeats)
    report["inner"] = inner(problems, truths, options.steps, options.repeats)
    report["gauss_newton_apart"] = statistics.fmean(map(distance, truths["gauss_newton"], truths["hessian"]))

    print(f"{size} parameters, lambda {LAM}, {options.tasks} tasks, float64, one thread, torch {torch.__version__}")
    for operator, title in OPERATORS.items():
        table(f"linear solvers, {title}", report[operator], {"products": "d", "error": ".1e"})
    table("inner solvers", report["inner"], {"steps": "d", "stationarity": ".1e", **dict.fromkeys(OPERATORS, ".1e")})
    print(f"\nthe Gauss-Newton meta-gradient differs from the true one by {report['gauss_newton_apart']:.1%}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.png:
        panels = {f"linear solvers, {title}": (report[operator], "error") for operator, title in OPERATORS.items()}
        panels |= {f"inner solvers, {title}": (report["inner"], operator) for operator, title in OPERATORS.items()}
        draw(panels).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
