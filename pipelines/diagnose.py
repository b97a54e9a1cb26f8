"""`imaml diagnose`: whether the implicit gradient of a run is one, on unseen tasks and in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process
from imaml_dist.distributed.build_algorithm import make_algorithm
from imaml_dist.errors import ConfigError
from imaml_dist.training.diagnosis import DIRECTIONS, LANCZOS_STEPS, Reference, System, diagnose
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.schedule import ResidualCap
from imaml_dist.training.state import updates_of
from imaml_dist.training.verdict import summarised, verdict
from pipelines import console
from pipelines.evaluate import as_possible_here, check_choice, opened

ROWS = {
    "stationarity of the inner solve": "stationarity",
    "distance from theta to phi": "distance",
    "smallest Ritz value of H + Lambda": "smallest",
    "within which of it an eigenvalue lies": "smallest_bound",
    "largest Ritz value": "largest",
    "smallest Ritz value of Gauss-Newton + Lambda": "gauss_newton_smallest",
    "largest of it": "gauss_newton_largest",
    "iterations of the linear solver": "iterations",
    "residual of the linear solve": "residual",
    "cosine to the first-order gradient": "cosine",
    "stationarity of the reference solve": "reference_stationarity",
    "distance from phi to phi*, of that from theta to phi*": "reference_distance",
    "relative error of the meta-gradient": "error",
    "relative error of the central differences themselves": "difference_error",
}

LEFT_OUT = {
    Reference.EXCLUDED: "the run itself excludes them",
    Reference.UNSOLVED: "the reference solve ended before a stationary point, at a kink or with its products spent",
    Reference.NO_MINIMISER: "H + Lambda is not positive definite at the stationary point found",
    Reference.MOVED_UNSOLVED: "an inner solve at a moved theta ended before a stationary point, at a kink or with its products spent",
    Reference.FLAT: "the query loss does not change with theta",
    Reference.NO_DERIVATIVE: "central differences of two sizes, or of two exactnesses of the inner solve, disagree",
}


def diagnose_run(path: str | Path, split: str = "test", tasks: int = 50) -> dict[str, Any]:
    """Diagnose the meta-gradient at the best checkpoint of a run, with the run's own solvers and operator, in float64.

    Args:
        path: run directory.
        split: train, val or test.
        tasks: how many.

    Returns:
        `{split, tasks, step, lanczos_steps, directions, verdict, summary, per_task}`; see `summarised` and `TaskDiagnosis`.

    Raises:
        InputError: no such run, split or checkpoint, or the run's algorithm has no implicit gradient.
    """
    check_choice(split, tasks)
    run, config = opened(path)
    if config.algorithm.kind != "imaml":
        raise ConfigError(
            f"{path} is a run of {config.algorithm.kind}, which solves no linear system and so has no implicit gradient to diagnose; "
            "give a run of imaml"
        )
    config = _in_float64(as_possible_here(config))
    prepare_process(config)
    source = make_source(config, open_dataset(config), split, training=False)
    step = run.best_checkpoint()
    tensors, facts = run.load_checkpoint(step)
    updates = updates_of(facts)
    learner = make_learner(config, source.image_shape, updates)
    if "cap" in facts:
        learner.algorithm = make_algorithm(config.algorithm, updates, ResidualCap.from_dict(facts["cap"]))
    exact = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    meta_parameters(learner).load(exact)
    with console.progress(f"diagnosing {config.name} on {split}") as show:
        found = diagnose(
            learner, source, tasks, device=config.run.device, progress=lambda done, total: show(done, total, "")
        )
    summary = summarised(found)
    said = verdict(summary)
    _show(config.name, summary, said)
    return {
        "split": split,
        "tasks": tasks,
        "step": step,
        "lanczos_steps": LANCZOS_STEPS,
        "directions": DIRECTIONS,
        "verdict": said,
        "summary": summary,
        "per_task": [task.to_dict() for task in found],
    }


def _in_float64(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": "float64"})})


def _show(name: str, summary: dict[str, Any], said: str) -> None:
    out = console.whole_lines()
    counts = summary["counts"]
    table = Table(title=f"{name}: {counts['tasks']} tasks", title_justify="left")
    for title in ("", "5%", "median", "95%"):
        table.add_column(title, justify="left" if not title else "right")
    for title, fact in ROWS.items():
        known = summary[fact]["tasks"] > 0
        table.add_row(title, *(f"{summary[fact][key]:.3g}" if known else "-" for key in ("p5", "median", "p95")))
    out.print(table)
    shares = ", ".join(f"{kind.value.replace('_', ' ')} {counts[kind]}" for kind in System)
    out.print(f"H + Lambda: {shares}", soft_wrap=True)
    solves = ", ".join(f"{solve.lower().replace('_', ' ')} {n}" for solve, n in counts["solves"].items())
    out.print(f"linear solves ended by: {solves or '-'}", soft_wrap=True)
    for kind, why in LEFT_OUT.items():
        if n := counts["references"][kind]:
            out.print(f"{n} of {counts['tasks']} tasks are not in the error: {why}", soft_wrap=True)
    out.print(said, soft_wrap=True)
