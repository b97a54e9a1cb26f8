"""What does the exact Gauss-Newton solve in the dual cost beside five steps of conjugate gradient?

python benchmarks/dual_solve.py --way 5 --shot 1 --json dual.json

Conv-4 on random images in float32, at its initial parameters, with our own kernels (`native`, what CPU runs use where there is
a compiler) and with torch's (`vmap`). All solves take turns, and ratios are medians of pairs from the same turn, so that
whatever else the machine does reaches all of them. Time is from the adapted parameters to the solution, all graphs included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imaml_dist.algorithms.loss import cross_entropy
from imaml_dist.algorithms.problem import Samples, TaskProblem
from imaml_dist.core.linear.conjugate_gradient import conjugate_gradient
from imaml_dist.core.linear.dual import dual_gauss_newton
from imaml_dist.core.linear.solution import LinearSolution
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.proximal.scalar import ScalarProximal
from imaml_dist.kernels import native
from imaml_dist.kernels.memory import keep_freed_memory
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel

LAM = 0.1

SOLVES: dict[str, Callable[..., LinearSolution]] = {
    "dual": dual_gauss_newton,
    "cg": partial(conjugate_gradient, max_iterations=5),
}


def network(way: int, normalisation: str) -> nn.Module:
    """Conv-4 with batch normalisation, with group normalisation (each sample by itself) or with none."""
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), way)
    for block in model.blocks:
        assert isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv2d)
        if normalisation == "group":
            block[1] = nn.Sequential(nn.GroupNorm(8, block[0].out_channels), nn.ReLU())
        elif normalisation == "none":
            block[1] = nn.ReLU()
    return model


class Setting:
    """One network under one execution, with a batch of tasks to solve for."""

    def __init__(self, way: int, shot: int, normalisation: str, execution: str, tasks: int, device: str) -> None:
        self.normalisation, self.execution, self.tasks, self.device = normalisation, execution, tasks, device
        functional = FunctionalModel(network(way, normalisation).to(device), native=execution == "native")
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(tasks, way * shot, 1, 28, 28, generator=generator).to(device)
        samples = Samples(x, torch.arange(way).repeat_interleave(shot).repeat(tasks, 1).to(device))
        self.phi = functional.parameters().expand(tasks, -1).contiguous()
        self.b = torch.randn(self.phi.shape, generator=generator).to(device)
        self.problem = TaskProblem(functional, cross_entropy, self.phi, samples, samples)
        self.pairs: list[tuple[float, float]] = []

    def once(self, name: str) -> tuple[float, LinearSolution]:
        """Milliseconds per task of one solve, and its solution."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        system = ProximalSystem(self.problem.gauss_newton(self.phi), ScalarProximal(LAM))
        solution = SOLVES[name](system, self.b)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / self.tasks, solution

    def turn(self, number: int) -> None:
        """Both solves, in an order that changes from turn to turn."""
        order = ("dual", "cg") if number % 2 else ("cg", "dual")
        taken = {name: self.once(name)[0] for name in order}
        self.pairs.append((taken["dual"], taken["cg"]))

    def result(self) -> dict[str, Any]:
        """Median milliseconds per task of both solves, and the median of their paired ratio with its quartiles."""
        ratios = [d / c for d, c in self.pairs]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return {
            "execution": self.execution,
            "normalisation": self.normalisation,
            "dual_ms": statistics.median(d for d, _ in self.pairs),
            "cg_ms": statistics.median(c for _, c in self.pairs),
            "ratio": middle,
            "ratio_quartiles": [low, high],
            **{f"{name}_residual": float(self.once(name)[1].residual.max()) for name in SOLVES},
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=4, help="at once")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_freed_memory()  # as workers do
    torch.set_num_threads(chosen.threads)
    executions = ["native", "vmap"] if chosen.device == "cpu" and native.usable() else ["vmap"]
    settings = [
        Setting(chosen.way, chosen.shot, normalisation, execution, chosen.tasks, chosen.device)
        for normalisation in ("none", "group", "batch")
        for execution in executions
    ]
    for number in range(-2, chosen.repeats):
        for setting in settings:
            setting.turn(number)
    for setting in settings:
        del setting.pairs[:2]  # the warm-up
    rows = [setting.result() for setting in settings]
    print(f"{chosen.way}-way {chosen.shot}-shot, ms per task, {chosen.tasks} tasks at once, {chosen.device}")
    print("normalisation  execution    dual  5 CG steps   ratio  (quartiles)    residual dual  residual CG")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['normalisation']:13}  {row['execution']:9} {row['dual_ms']:7.1f} {row['cg_ms']:11.1f} {row['ratio']:7.2f}  "
            f"({low:.2f} to {high:.2f})  {row['dual_residual']:14.1e} {row['cg_residual']:12.1e}"
        )
    if chosen.json:
        facts = {k: v for k, v in vars(chosen).items() if k != "json"}
        chosen.json.write_text(json.dumps({**facts, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
