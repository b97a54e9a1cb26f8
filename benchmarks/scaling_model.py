"""How long would a meta-step take on W workers? A model of its parts, from what was measured on few.

    t(W) = a s(W) + r + alpha m(W) + beta b(W) + gamma l(W)

with the tasks of a worker fixed (weak scaling). a: seconds that a worker computes, data included. s(W): how much longer the slowest of
W takes than the mean. r: the rest of a step, which does not depend on W. m and b: messages and bytes that a worker sends. alpha:
seconds a message. beta: seconds a byte, the additions on its way included. gamma: seconds a node that
is looked at when every worker works out, in every step, who holds which nodes of the tree: l(W) = (W - 1) log2(c W) with c chunks for
each. Efficiency is t(1) / t(W).

A step has k + 3 collectives: those of the exact reduction (k exchanges of segments, k the most nodes of the tree that a worker
holds, then a gathering), the facts of all tasks, and a word on whether to stop. Over gloo each takes W - 1 messages of every
worker. All nodes of a worker but the last travel while it computes; here they count as if they did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from imaml_dist.algorithms.record import TaskRecord
from imaml_dist.distributed.chunks import dealt_to
from imaml_dist.distributed.reduction import own_nodes

WORLDS = tuple(2**n for n in range(11))
"""1 to 1,024 workers."""

FLOAT, FACT = 4, 8
"""Bytes of a number of the gradient (float32) and of a fact of a task (float64)."""


@dataclass(frozen=True)
class Inputs:
    """What a prediction is made of.

    Attributes:
        compute: seconds that a worker computes in a step, data included, on the mean.
        rest: seconds of a step that do not depend on the number of workers.
        alpha: seconds a message.
        beta: seconds a byte.
        gamma: seconds a node looked at, to work out who holds which.
        parameters: numbers of the meta-gradient, P.
        chunks: chunks of a worker.
        chunk: tasks of a chunk.
        lateness: seconds that a worker computed over the mean of them, for some workers in some steps; none for no stragglers.
    """

    compute: float
    rest: float
    alpha: float
    beta: float
    gamma: float
    parameters: int
    chunks: int
    chunk: int
    lateness: tuple[float, ...] = ()


def most_rows(chunks: int, world: int) -> int:
    """k, the most nodes of the tree that a worker holds, with so many chunks for each."""
    total = chunks * world
    return max(len(own_nodes(dealt_to(rank, world, total), total)) for rank in range(world))


def reduction_messages(rows: int, world: int) -> int:
    """Messages that a worker sends in an exact reduction of k rows: `(k + 1) (W - 1)`."""
    return (rows + 1) * (world - 1)


def reduction_bytes(parameters: int, rows: int, world: int) -> int:
    """Bytes that a worker with k rows sends in an exact reduction: `4 (k + 1) ceil(P / W) (W - 1)`."""
    return FLOAT * (rows + 1) * -(-parameters // world) * (world - 1)


def facts_bytes(tasks: int, world: int) -> int:
    """Bytes that a worker sends for all to know what became of its tasks: `8 F T (W - 1)`, F facts a task, T tasks a worker."""
    return FACT * len(TaskRecord.names()) * tasks * (world - 1)


def expected_slowest(lateness: Sequence[float], world: int) -> float:
    """Mean of the largest of W values drawn from n: `sum_i x_i ((i / n)^W - ((i - 1) / n)^W)`, x in ascending order; 1 for none.

    Workers are taken to be late independently of each other. Beyond about n workers it is the largest value seen, and no more.
    """
    n = len(lateness)
    return sum(x * ((i / n) ** world - ((i - 1) / n) ** world) for i, x in enumerate(sorted(lateness), 1)) if n else 1.0


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """alpha and beta with the least sum of `((alpha m + beta b) / t - 1)^2` over (m, b, t), neither below zero.

    Raises:
        ValueError: the points cannot tell one from the other.
    """
    mm = sum((m / t) ** 2 for m, b, t in points)
    bb = sum((b / t) ** 2 for m, b, t in points)
    mb = sum(m * b / t**2 for m, b, t in points)
    m1, b1 = sum(m / t for m, b, t in points), sum(b / t for m, b, t in points)
    determinant = mm * bb - mb * mb
    if determinant <= 1e-9 * mm * bb:
        raise ValueError("alpha and beta cannot be told apart: measure several sizes")
    alpha, beta = (bb * m1 - mb * b1) / determinant, (mm * b1 - mb * m1) / determinant
    if alpha < 0:
        return 0.0, b1 / bb
    return (alpha, beta) if beta >= 0 else (m1 / mm, 0.0)


def nodes_looked_at(chunks: int, world: int) -> float:
    """What working out who holds what grows with: `(W - 1) log2(c W)`, c chunks a worker."""
    return (world - 1) * math.log2(chunks * world)


def fit_slope(points: Sequence[tuple[float, float]]) -> float:
    """gamma with the least sum of `(gamma l / t - 1)^2` over (l, t)."""
    return sum(x / t for x, t in points) / sum((x / t) ** 2 for x, t in points)


def predicted(inputs: Inputs, world: int) -> dict[str, float]:
    """Seconds of a step by part, the whole step, and the efficiency; with one worker nothing is sent."""
    tasks = inputs.chunks * inputs.chunk
    rows = most_rows(inputs.chunks, world)
    sent = reduction_bytes(inputs.parameters, rows, world)
    reduce = inputs.alpha * reduction_messages(rows, world) + inputs.beta * sent
    facts = inputs.alpha * 2 * (world - 1) + inputs.beta * facts_bytes(tasks, world)
    wait = inputs.compute * (expected_slowest(inputs.lateness, world) - expected_slowest(inputs.lateness, 1))
    plan = inputs.gamma * nodes_looked_at(inputs.chunks, world)
    step = inputs.compute + wait + inputs.rest + reduce + facts + plan
    return {
        "workers": world,
        "rows": rows,
        "megabytes": sent / 1e6,
        "wait": wait,
        "reduce": reduce,
        "facts": facts,
        "plan": plan,
        "step": step,
        "efficiency": (inputs.compute + inputs.rest) / step,
    }


def prediction(inputs: Inputs, worlds: Sequence[int] = WORLDS) -> list[dict[str, float]]:
    """A row for each number of workers."""
    return [predicted(inputs, world) for world in worlds]


def inputs_of(report: dict[str, Any]) -> Inputs:
    """The inputs that a report of `scaling.py` gives: one worker's step, and lines fitted to reductions between no more than cores."""
    ms = report["rows"]["one worker"]["ms"]
    compute = sum(ms[phase] for phase in ("data", "inner", "query", "solve")) / 1e3
    points = []
    for p in report["reduction"]:
        rows, world = most_rows(p["chunks"], p["workers"]), p["workers"]
        if world <= report["cores"]:
            points.append(
                (reduction_messages(rows, world), reduction_bytes(p["parameters"], rows, world), p["seconds"])
            )
    alpha, beta = fit(points)
    return Inputs(
        compute=compute,
        rest=ms["step"] / 1e3 - compute,
        alpha=alpha,
        beta=beta,
        gamma=fit_slope([(nodes_looked_at(report["chunks"], p["workers"]), p["seconds"]) for p in report["planning"]]),
        parameters=report["parameters"],
        chunks=report["chunks"],
        chunk=report["chunk"],
        lateness=tuple(report["lateness"]),
    )


def changed(inputs: Inputs, **given: Any) -> Inputs:
    """The inputs with what is given, and not None, in their place."""
    return replace(inputs, **{name: value for name, value in given.items() if value is not None})


def table(rows: Sequence[dict[str, float]]) -> str:
    """For a terminal: milliseconds and per cent."""
    head = ("workers", "k", "MB sent", "wait ms", "reduce ms", "facts ms", "plan ms", "step ms", "efficiency")
    lines = ["{:>7} {:>2} {:>8} {:>8} {:>10} {:>9} {:>8} {:>9} {:>10}".format(*head)]
    for row in rows:
        ms = {part: 1e3 * row[part] for part in ("wait", "reduce", "facts", "plan", "step")}
        lines.append(
            f"{row['workers']:7} {row['rows']:2} {row['megabytes']:8.2f} {ms['wait']:8.1f} {ms['reduce']:10.1f} {ms['facts']:9.1f} "
            f"{ms['plan']:8.1f} {ms['step']:9.1f} {row['efficiency']:10.1%}"
        )
    return "\n".join(lines)
