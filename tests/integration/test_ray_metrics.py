"""What Prometheus would read of a run, from a real Ray node."""

from helpers.ray_metrics import scraped

LINE = {
    "step": 6, "tasks_per_second": 12.5, "query_accuracy": 0.5, "val_accuracy": 0.75, "seconds_step": 2.0, "seconds_solve": 0.5,
    "accepted": 14, "excluded": 2, "excluded_non_finite": 2, "cg_converged": 3, "cg_max_iterations": 11, "cg_residual": 0.1,
    "grad_norm": None, "seconds_data": None,
}  # fmt: skip


def exported() -> dict[tuple[str, ...], float]:
    """`(name, sorted labels of ours) -> value`, of two lines."""
    return {
        (name, *sorted(f'{label}="{labels[label]}"' for label in ("run", "phase", "outcome") if label in labels)): value
        for name, labels, value in scraped([{**LINE, "step": 5}, LINE])
        if name.startswith("ray_imaml_")
    }


def test_prometheus_reads_what_the_lines_of_metrics_say():
    run = 'run="mine"'
    assert exported() == {
        ("ray_imaml_tasks_per_second", run): 12.5,
        ("ray_imaml_query_accuracy", run): 0.5,
        ("ray_imaml_val_accuracy", run): 0.75,
        ("ray_imaml_meta_step", run): 7.0,
        ("ray_imaml_restarts", run): 1.0,
        ("ray_imaml_step_seconds", 'phase="step"', run): 2.0,
        ("ray_imaml_step_seconds", 'phase="solve"', run): 0.5,
        ("ray_imaml_tasks_total", 'outcome="accepted"', run): 28.0,
        ("ray_imaml_tasks_total", 'outcome="excluded"', run): 4.0,
        ("ray_imaml_tasks_total", 'outcome="excluded_non_finite"', run): 4.0,
        ("ray_imaml_solves_total", 'outcome="converged"', run): 6.0,
        ("ray_imaml_solves_total", 'outcome="max_iterations"', run): 22.0,
    }
