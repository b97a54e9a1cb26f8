"""`imaml report`: one page of a run, finished or not; or one that compares several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imaml_dist.reporting.comparison import write_comparison
from imaml_dist.reporting.report import write_report
from imaml_dist.training.remote_run import open_run


def report_run(where: str) -> str:
    """Write `report.html` into a run directory.

    Returns:
        Where it lies.

    Raises:
        InputError: no run directory, or one of its files is damaged.
    """
    run = open_run(where)
    run.collect()
    run.config()
    write_report(run.path)
    run.share(run.report_file)
    return f"{run.url}/{run.report_file.name}"


def compare_runs(where: Sequence[str], out: Path) -> str:
    """Write a page that compares several runs.

    Args:
        where: run directories.
        out: the page.

    Returns:
        Where it lies.

    Raises:
        InputError: one is no run directory or given twice, or one of its files is damaged.
    """
    runs = [open_run(one) for one in where]
    for run in runs:
        run.collect()
    return str(write_comparison([run.path for run in runs], out, [run.address for run in runs]))
