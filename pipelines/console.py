"""What a person sees: messages, progress bars on a terminal and plain lines elsewhere, and the final table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# No markup: paths and names are the user's, and may hold brackets.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def whole_lines() -> Console:
    """For tables: as wide as the terminal, and into a file or a pipe as wide as they are."""
    return out if out.is_terminal else Console(width=10_000, highlight=False, markup=False, emoji=False)


TWO_ACCURACIES = (
    "Accuracy is transductive, as the field reports it: the query images of a task are normalised together. "
    "Inductive: each query image alone, with statistics from the support set."
)

_PLAIN_EVERY_S = 10.0


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callable `(done, total, remark)`: a bar on a terminal, a line every ten seconds otherwise."""
    if out.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[remark]}"), console=out) as bar:
            task = bar.add_task(what, total=None, remark="")

            def update(done: int, total: int, remark: str = "") -> None:
                bar.update(task, completed=done, total=total or None, remark=remark)

            yield update
        return
    last = time.monotonic() - _PLAIN_EVERY_S

    def line(done: int, total: int, remark: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_EVERY_S or done == total:
            last = time.monotonic()
            out.print(f"{what}: {done}/{total} {remark}".rstrip(), soft_wrap=True)

    yield line


def step_remark(record: dict[str, Any]) -> str:
    """The facts of a meta-step that are worth a glance."""
    parts = []
    for key, label, scale in (("query_accuracy", "accuracy", 100.0), ("val_accuracy", "validation", 100.0)):
        if record.get(key) is not None:
            parts.append(f"{label} {scale * record[key]:.1f}%")
    for key, label in (("meta_loss", "loss"), ("cg_residual", "residual"), ("stationarity", "stationarity")):
        if record.get(key) is not None:
            parts.append(f"{label} {record[key]:.3g}")
    if record.get("excluded"):
        parts.append(f"excluded {record['excluded']}" + (", step skipped" if record.get("step_skipped") else ""))
    if record.get("s3_retries"):
        parts.append(f"storage asked again {record['s3_retries']:.0f} times")
    if record.get("tasks_per_second") is not None:
        parts.append(f"{record['tasks_per_second']:.1f} tasks/s")
    return ", ".join(parts)


def table(title: str, rows: dict[str, str], note: str = "") -> None:
    """Two columns: what, and its value; below them what a reader must know."""
    grid = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        grid.add_row(name, value)
    out.print(grid)
    if note:
        out.print(note, soft_wrap=True)


def percent(mean: float | None, ci95: float | None) -> str:
    """`93.4% ± 0.6`, or a dash."""
    return "-" if mean is None else f"{100 * mean:.2f}%" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")
