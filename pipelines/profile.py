"""The table of a profiled run: where the time of a meta-step went."""

from __future__ import annotations

from rich.table import Table

from imaml_dist.training.run_directory import RunDirectory
from pipelines import console


def show_profile(run: RunDirectory) -> None:
    """Print what `RUN/profile/profile.json` says, or that the run was too short for it."""
    found = run.read_json(run.profile_file)
    if found is None:
        console.err.print(
            "the run ended before the meta-steps to be profiled had been taken; give it more run.steps", soft_wrap=True
        )
        return
    title = (
        f"one of {found['steps']} meta-steps of rank 0: {found['tasks_per_step']} tasks, {found['threads']} threads, "
        f"{1e3 * found['seconds_per_step']:.0f} ms"
    )
    grid = Table(title=title, title_justify="left")
    for name in ("phase", "ms", "share", "GFLOP", "GFLOP/s", "of peak"):
        grid.add_column(name, justify="left" if name == "phase" else "right")
    for row in found["phases"]:
        work = (
            (f"{row['gflop']:.2f}", f"{row['gflop_per_second']:.1f}", f"{row['of_peak']:.0%}")
            if row["gflop"]
            else ("",) * 3
        )
        grid.add_row(row["phase"], f"{1e3 * row['seconds']:.1f}", f"{row['share']:.1%}", *work)
    console.out.print(grid)
    console.out.print(
        f"Peak: {found['peak_gflops']:.0f} GFLOP/s, a product of large matrices here and now. FLOPs: those of convolutions and "
        f"products of matrices. Trace of one step, for perfetto: {run.url}/{run.profile.name}/trace.json.gz",
        soft_wrap=True,
    )
