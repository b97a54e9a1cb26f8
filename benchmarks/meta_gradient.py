"""How many tasks a second does one thread turn into meta-gradients, beside other ways to compute the same?

python benchmarks/meta_gradient.py --setting 5w1s --repeats 9 --json meta_gradient.json

One work item for all: Conv-4 on random images, 16 inner steps with the proximal term (lambda 2), the implicit gradient by 5
steps of conjugate gradient on the Hessian, no early stop; MAML through the same 16 steps without a proximal term. First every
implicit method is shown to be right in float64, with conjugate gradient run to its end. Then all take turns, after a warm-up,
and ratios are medians of pairs from the same turn, so that whatever else the machine does reaches all of them. TorchOpt and
higher take part where they are installed; their programs are written on their public interfaces.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from imaml_dist import IMAML, ConjugateGradient, GradientDescent, MetaLearner
from imaml_dist.algorithms.algorithm import Algorithm
from imaml_dist.algorithms.problem import Operator
from imaml_dist.kernels.memory import keep_freed_memory
from imaml_dist.models.conv4 import Conv4
from imaml_dist.tasks.episode import EpisodeBatch

LAM, LR, STEPS, CG_STEPS = 2.0, 0.1, 16, 5
CHECK_LAM, CHECK_LR = 60.0, 0.005
"""For the check: `H + lambda I` must be positive definite, without which conjugate gradient solves nothing."""

SETTINGS = {"5w1s": (5, 1, 5, 8, 2.19), "20w5s": (20, 5, 5, 2, 43.9)}
"""way, shot, queries a class, tasks at once, GFLOP a task that no implementation of this method can do without."""

Method = Callable[[nn.Module, EpisodeBatch], list[Tensor]]
"""The mean meta-gradient of a network, parameter by parameter."""


def ours(
    execution: Any, cg_steps: int, lam: float, lr: float, steps: int = STEPS, operator: Operator = "hessian"
) -> Method:
    """This library."""
    solver = ConjugateGradient(max_iterations=cg_steps, operator=operator)
    return learned(IMAML(lam, GradientDescent(lr, steps), solver), execution)


def learned(algorithm: Algorithm, execution: Any) -> Method:
    """An algorithm of this library; a network's learner is made once."""

    def compute(model: nn.Module, episodes: EpisodeBatch) -> list[Tensor]:
        if id(model) not in learners:
            learners[id(model)] = MetaLearner(model, algorithm, execution=execution)
        found = learners[id(model)].meta_gradient(episodes).gradient
        return [found[name] for name, _ in model.named_parameters()]

    learners: dict[int, MetaLearner] = {}
    return compute


def plain(cg_steps: int, lam: float, lr: float) -> Method:
    """One task after the other, as one writes it down: a new graph for every product with the Hessian."""

    def one(model: nn.Module, e: EpisodeBatch, t: int) -> list[Tensor]:
        names, theta = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)

        def loss(phi: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (x[t],)), y[t])

        def leaves(phi: Any) -> list[Tensor]:
            return [p.detach().requires_grad_() for p in phi]

        def product(v: list[Tensor]) -> list[Tensor]:
            point = leaves(phi)
            first = torch.autograd.grad(loss(point, e.support_x, e.support_y), point, create_graph=True)
            return [h + lam * p for h, p in zip(torch.autograd.grad(first, point, v), v, strict=True)]

        def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
            return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

        phi = list(theta)
        for _ in range(STEPS):
            point = leaves(phi)
            slope = torch.autograd.grad(loss(point, e.support_x, e.support_y), point)
            phi = [p - lr * (g + lam * (p - q)) for p, g, q in zip(phi, slope, theta, strict=True)]
        point = leaves(phi)
        v = list(torch.autograd.grad(loss(point, e.query_x, e.query_y), point))
        u, r, p = [torch.zeros_like(x) for x in v], v, v
        rr = dot(r, r)
        for _ in range(cg_steps):
            ap = product(p)
            alpha = rr / dot(p, ap)
            u = [x + alpha * y for x, y in zip(u, p, strict=True)]
            r = [x - alpha * y for x, y in zip(r, ap, strict=True)]
            rr, before = dot(r, r), rr
            p = [x + rr / before * y for x, y in zip(r, p, strict=True)]
        return [lam * x for x in u]

    return lambda model, e: mean_over_tasks(lambda t: one(model, e, t), e)


def torchopt_imaml(solver: str, cg_steps: int, lam: float, lr: float, steps: int = STEPS) -> Method:
    """TorchOpt's module for implicit gradients: `solve_normal_cg` is what its example uses, `solve_cg` the paper's."""
    import torchopt

    solve = getattr(torchopt.linear_solve, solver)(maxiter=cg_steps, atol=0.0)

    class Task(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve):  # type: ignore[misc, call-arg]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.meta = model
            self.net = torchopt.module_clone(model, by="deepcopy", detach_buffers=True)
            for own in self.net.parameters():
                own.detach_().requires_grad_()

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            pairs = zip(self.net.parameters(), self.meta.parameters(), strict=True)
            pull = sum((p - q).square().sum() for p, q in pairs)
            total: Tensor = cross_entropy(self.net(x), y) + 0.5 * lam * pull
            return total

        def solve(self, x: Tensor, y: Tensor) -> Any:
            own = tuple(self.net.parameters())
            optimizer = torchopt.SGD(own, lr=lr)
            with torch.enable_grad():
                for _ in range(steps):
                    loss = self.objective(x, y)
                    optimizer.zero_grad()
                    loss.backward(inputs=own)  # type: ignore[no-untyped-call]
                    optimizer.step()
            return self

    def one(model: nn.Module, e: EpisodeBatch, t: int) -> list[Tensor]:
        task = Task(model)
        task.solve(e.support_x[t], e.support_y[t])
        loss = cross_entropy(task.net(e.query_x[t]), e.query_y[t])
        return list(torch.autograd.grad(loss, tuple(model.parameters())))

    return lambda model, e: mean_over_tasks(lambda t: one(model, e, t), e)


def higher_maml(steps: int = STEPS) -> Method:
    """MAML by the package higher."""
    import higher

    def one(model: nn.Module, e: EpisodeBatch, t: int) -> list[Tensor]:
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=LR)) as (net, optimizer):
            for _ in range(steps):
                optimizer.step(cross_entropy(net(e.support_x[t]), e.support_y[t]))
            loss = cross_entropy(net(e.query_x[t]), e.query_y[t])
            return list(torch.autograd.grad(loss, net.parameters(time=0)))

    return lambda model, e: mean_over_tasks(lambda t: one(model, e, t), e)


def mean_over_tasks(one: Callable[[int], list[Tensor]], episodes: EpisodeBatch) -> list[Tensor]:
    """Mean of what every task gives."""
    tasks = [one(t) for t in range(len(episodes))]
    return [torch.stack(parts).mean(0) for parts in zip(*tasks, strict=True)]


def methods(cg_steps: int, lam: float, lr: float) -> dict[str, Method]:
    """Those that can be had here."""
    found: dict[str, Method] = {f"imaml_dist, {e}": ours(e, cg_steps, lam, lr) for e in ("native", "vmap", "loop")}
    found["plain torch, one task at a time"] = plain(cg_steps, lam, lr)
    for name, solver in (("TorchOpt iMAML example", "solve_normal_cg"), ("TorchOpt with plain CG", "solve_cg")):
        try:
            found[name] = torchopt_imaml(solver, cg_steps, lam, lr)
        except ImportError:
            print(f"{name}: not measured, torchopt is not installed")
    try:
        found["higher, MAML"] = higher_maml()
    except ImportError:
        print("higher, MAML: not measured, higher is not installed")
    return found


def work(setting: str, dtype: torch.dtype, tasks: int) -> tuple[nn.Module, EpisodeBatch]:
    """The network and the tasks, of random images."""
    way, shot, query = SETTINGS[setting][:3]
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), way).to(dtype)
    x = torch.rand(tasks, way * shot, 1, 28, 28, dtype=dtype)
    q = torch.rand(tasks, way * query, 1, 28, 28, dtype=dtype)
    labels = torch.arange(way)
    return model, EpisodeBatch(x, labels.repeat(tasks, shot), q, labels.repeat(tasks, query), index=torch.arange(tasks))


def errors() -> dict[str, float]:
    """Relative difference of every implicit method to the plain one, float64, conjugate gradient to its end."""
    model, episodes = work("5w1s", torch.float64, 2)
    found = {
        name: torch.cat([part.flatten() for part in compute(model, episodes)])
        for name, compute in methods(100, CHECK_LAM, CHECK_LR).items()
        if "MAML" not in name or "iMAML" in name
    }
    truth = found["plain torch, one task at a time"]
    return {name: float((gradient - truth).norm() / truth.norm()) for name, gradient in found.items()}


def peak() -> float:
    """GFLOP/s of a product of two large matrices."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    began = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * 1024**3 / (time.perf_counter() - began) / 1e9


def facts() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def measure(setting: str, repeats: int) -> dict[str, Any]:
    """Tasks a second, all methods in turn."""
    tasks, gflop = SETTINGS[setting][3:]
    model, episodes = work(setting, torch.float32, tasks)
    running = methods(CG_STEPS, LAM, LR)
    for compute in running.values():
        compute(model, episodes)
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turn = {"peak": peak()}
        for name, compute in running.items():
            began = time.perf_counter()
            compute(model, episodes)
            turn[name] = tasks / (time.perf_counter() - began)
        turns.append(turn)
        print(".", end="", flush=True)
    print()
    first = next(iter(running))
    return {
        name: {
            "tasks_per_second": statistics.median(turn[name] for turn in turns),
            "spread": [min(turn[name] for turn in turns), max(turn[name] for turn in turns)],
            "ours_is_times_faster": statistics.median(turn[first] / turn[name] for turn in turns),
            "useful_fraction_of_peak": statistics.median(turn[name] * gflop / turn["peak"] for turn in turns),
        }
        for name in running
    }


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the others' use of older torch
    torch.set_num_threads(1)
    keep_freed_memory()
    report: dict[str, Any] = {**facts(), "errors": errors(), "settings": {}}
    for name, error in report["errors"].items():
        print(f"{name:34} float64 relative difference {error:.1e}")
    for setting in options.setting:
        rows = report["settings"][setting] = measure(setting, options.repeats)
        print(f"\n{setting:34} {'tasks/s':>8} {'(spread)':>16} {'ours is':>8} {'of peak':>8}")
        for name, row in rows.items():
            low, high = row["spread"]
            ratio, useful = row["ours_is_times_faster"], row["useful_fraction_of_peak"]
            share = "" if "MAML" in name and "iMAML" not in name else f"{useful:8.0%}"
            print(f"{name:34} {row['tasks_per_second']:8.2f} {f'({low:.2f}..{high:.2f})':>16} {ratio:7.2f}x {share}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
