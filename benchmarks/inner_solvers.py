"""Which inner solver reaches a stationary point at the least cost, and is the system of the implicit gradient positive definite there?

imaml train pipelines/configs/omniglot.yaml --set 'algorithm={kind: imaml}' --set run.steps=200 --run-dir runs/silu
python benchmarks/inner_solvers.py runs/silu --json inner_solvers.json

Test tasks at the meta-parameters of a run, in float64: every solver with every Lambda, one strength for all parameters or another
for the head. Told are medians over tasks, and the worst: gradients of the inner objective (products of Newton-CG count two),
stationarity, `G`, norm(phi - theta), the smallest eigenvalue of `H + Lambda` as 50 steps of Lanczos see it, over the smallest strength, and
processor seconds per task relative to 16 steps of gradient descent. Where Lambda is not the one that the network was trained with, it
tells of the inner problem alone and not of a network trained so.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from meta_gradient import facts

from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.inner import LBFGS, GradientDescent, InnerSolver, Momentum, NewtonCG
from imaml_dist.algorithms.strength import ProximalStrength
from imaml_dist.core.curvature import hessian_operator
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.spectrum import lanczos
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory

SOLVERS: dict[str, tuple[InnerSolver, int]] = {
    "16 of descent": (GradientDescent(0.1, 16), 17),
    "64 of descent": (GradientDescent(0.1, 64), 65),
    "16 of Nesterov": (Momentum(0.1, 16, momentum=0.7, nesterov=True), 17),
    "L-BFGS 8": (LBFGS(0.1, 8), 9),
    "L-BFGS 16": (LBFGS(0.1, 16), 17),
    "L-BFGS 50": (LBFGS(0.1, 50), 51),
    "Newton-CG 4": (NewtonCG(4, 5), 4 * (1 + 2 * 6 + 1)),
    "Newton-CG 4, Hessian": (NewtonCG(4, 5, operator="hessian"), 4 * (1 + 2 * 6 + 1)),
}
"""And gradients they take, with products as two and lengths tried as one."""

STRENGTHS = ((0.1, 0.1), (0.5, 0.5), (2.0, 2.0), (1.0, 0.1), (3.0, 0.1), (10.0, 0.1), (1.0, 0.03))
"""Of the body and of the head."""


def measure(learner: Any, episodes: Any, body: float, head: float, solver: InnerSolver) -> dict[str, float]:
    """All tasks at once."""
    algorithm = IMAML(ProximalStrength("per_layer", init=body, layers=(("head", head),)))
    problem = learner.problem(episodes, learner.meta_parameters())
    proximal = algorithm.proximal(problem)
    began = time.process_time()
    found = solver.solve(problem, proximal)
    seconds = time.process_time() - began
    system = ProximalSystem(hessian_operator(problem.support_loss, found.params), proximal)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(found.params.shape, dtype=found.params.dtype, generator=generator)
    ritz = lanczos(system, start, steps=50)
    lowest = (ritz.smallest / min(body, head)).tolist()
    delta = found.params - problem.anchor
    reached = found.stationarity.tolist()
    return {
        "stationarity": statistics.median(reached),
        "stationarity_worst": max(reached),
        "objective": float((found.loss + proximal.value(delta)).mean()),
        "distance": float(torch.linalg.vector_norm(delta, dim=-1).mean()),
        "lowest": statistics.median(lowest),
        "lowest_worst": min(lowest),
        "positive_definite": float(ritz.positive.double().mean()),
        "seconds": seconds / len(reached),
    }


def main() -> None:
    """Measure, print a table in Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of an iMAML run of Conv-4 whose last layer is `head`")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = RunDirectory(options.run)
    config = run.config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"precision": "float64", "device": "cpu"})})
    prepare_process(config)
    source = make_source(config, open_dataset(config), "test")
    learner = make_learner(config, source.image_shape)
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        raise SystemExit(f"{options.run} has no checkpoint; train it first")
    tensors = checkpoint[0]
    meta_parameters(learner).load({name: value.double() for name, value in tensors.items()})
    episodes = source.episodes(0, range(options.tasks))
    rows: list[dict[str, Any]] = []
    print(
        "| lambda | solver | gradients | stationarity (worst) | G | distance | lowest / lambda (worst) | > 0 | seconds |"
    )
    print("|" + "---|" * 9)
    for body, head in STRENGTHS:
        first = None
        for name, (solver, gradients) in SOLVERS.items():
            row = measure(learner, episodes, body, head, solver)
            first = first or row["seconds"]
            rows.append({"body": body, "head": head, "solver": name, "gradients": gradients, **row})
            lam = f"{body:g}" if body == head else f"{body:g}, head {head:g}"
            print(
                f"| {lam} | {name} | {gradients} | {row['stationarity']:.5f} ({row['stationarity_worst']:.5f}) | {row['objective']:.4f} | "
                f"{row['distance']:.2f} | {row['lowest']:.2f} ({row['lowest_worst']:.2f}) | {row['positive_definite']:.0%} | "
                f"{row['seconds'] / first:.1f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({**facts(), "tasks": options.tasks, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
