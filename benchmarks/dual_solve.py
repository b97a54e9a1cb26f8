"""What does the exact Gauss-Newton solve in the dual cost beside five steps of conjugate gradient?

python benchmarks/dual_solve.py --way 5 --shot 1 --json dual.json

Conv-4 on random images in float32, at its initial parameters; the two solves alternate, so that whatever else the machine
does reaches both. Time is from the adapted parameters to the solution, all graphs included.
"""

import argparse
import json
import statistics
import time
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
from imaml_dist.models.conv4 import Conv4
from imaml_dist.models.functional import FunctionalModel

LAM = 0.1


def network(way: int, normalisation: str) -> nn.Module:
    """Conv-4 with batch normalisation, with group normalisation (each sample by itself) or with none."""
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), way)
    for block in model.blocks:
        if normalisation != "batch":
            channels = block[0].out_channels
            block[1] = nn.GroupNorm(8, channels) if normalisation == "group" else nn.Identity()
    return model


def measure(way: int, shot: int, normalisation: str, tasks: int, repeats: int, device: str) -> dict[str, Any]:
    """Median milliseconds per task of both solves, and the median of their paired ratio."""
    functional = FunctionalModel(network(way, normalisation).to(device))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(tasks, way * shot, 1, 28, 28, generator=generator).to(device)
    samples = Samples(x, torch.arange(way).repeat_interleave(shot).repeat(tasks, 1).to(device))
    phi = functional.parameters().expand(tasks, -1).contiguous()
    b = torch.randn(phi.shape, generator=generator).to(device)
    problem = TaskProblem(functional, cross_entropy, phi, samples, samples)
    solves = {"dual": dual_gauss_newton, "cg": partial(conjugate_gradient, max_iterations=5)}

    def once(name: str) -> tuple[float, LinearSolution]:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        solution = solves[name](ProximalSystem(problem.gauss_newton(phi), ScalarProximal(LAM)), b)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / tasks, solution

    residuals = {name: float(once(name)[1].residual.max()) for name in solves}  # and warm up
    pairs = [(once("dual")[0], once("cg")[0]) for _ in range(repeats)]
    return {
        "normalisation": normalisation,
        "dual_ms": statistics.median(d for d, _ in pairs),
        "cg_ms": statistics.median(c for _, c in pairs),
        "ratio": statistics.median(d / c for d, c in pairs),
        "dual_residual": residuals["dual"],
        "cg_residual": residuals["cg"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [
        measure(chosen.way, chosen.shot, normalisation, chosen.tasks, chosen.repeats, chosen.device)
        for normalisation in ("none", "group", "batch")
    ]
    print(f"{chosen.way}-way {chosen.shot}-shot, ms per task, {chosen.tasks} tasks at once, {chosen.device}")
    print("normalisation   dual  5 CG steps   ratio   residual dual   residual CG")
    for row in rows:
        print(
            f"{row['normalisation']:13} {row['dual_ms']:6.1f} {row['cg_ms']:11.1f} {row['ratio']:7.2f} "
            f"{row['dual_residual']:15.1e} {row['cg_residual']:13.1e}"
        )
    if chosen.json:
        facts = {k: v for k, v in vars(chosen).items() if k != "json"}
        chosen.json.write_text(json.dumps({**facts, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
