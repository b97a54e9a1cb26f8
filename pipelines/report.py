"""`imaml report`: one page of a run, finished or not."""

from __future__ import annotations

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
    write_report(run.path)
    run.share(run.report_file)
    return f"{run.url}/{run.report_file.name}"
