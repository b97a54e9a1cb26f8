"""`imaml train --seeds`: the same run under several seeds, one after the other, and what they come to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imaml_dist.config.load import flatten, load_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ConfigError, InputError, TrackingError
from imaml_dist.storage.local import exclusive, local_path
from imaml_dist.tracking.mlflow_parent import MlflowParent
from imaml_dist.training.repeats import Spread
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console
from pipelines.tracking import mlflow_parent
from pipelines.train import train

RESULT, PAGE, LOCK = "seeds.json", "report.html", ".driver.lock"

SPREADS = {
    "test_accuracy": "test accuracy",
    "test_accuracy_inductive": "the same, inductive",
    "val_accuracy": "validation accuracy",
}
"""Fields of `summary.json` that repeats are compared by."""


def train_seeds(
    config_path: Path, overrides: Sequence[str], run_dir: str | Path | None, fresh: bool, seeds: int
) -> bool:
    """Train under the configured seed and the next ones, each in `RUN/seed-<seed>`.

    The same command again goes on with the first seed that is not finished. Every run is a child of one MLflow run. In the end
    `RUN/seeds.json` has the spread, and `RUN/report.html` compares the runs.

    Args:
        config_path, overrides, run_dir, fresh: as `train` takes them.
        seeds: how many, >= 2.

    Returns:
        True when all are finished; False when one was interrupted, with a checkpoint written.

    Raises:
        ImamlError: see `train`; and if the directory holds something else.
    """
    config = load_config(config_path, overrides)
    folder = _folder(run_dir or Path("runs") / f"{config.name}-seeds")
    first = config.run.seed
    if first + seeds > 2**63:
        raise ConfigError(
            f"--seeds {seeds}: with run.seed {first} the last seed is above 2^63 - 1; take a smaller run.seed"
        )
    runs = {seed: folder / f"seed-{seed}" for seed in range(first, first + seeds)}
    _check_usable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK) as held:
        if not held:
            raise InputError(
                f"{folder} is being trained by another imaml train; wait for it, or choose another --run-dir"
            )
        if fresh:
            _clear(folder)
        return _train_all(config, config_path, overrides, folder, runs, fresh)


def _train_all(
    config: ExperimentConfig,
    config_path: Path,
    overrides: Sequence[str],
    folder: Path,
    runs: dict[int, Path],
    fresh: bool,
) -> bool:
    seeds = len(runs)
    parent = _parent(config, folder, seeds)
    parent_id = None if parent is None else parent.run_id
    status = "FAILED"
    try:
        for seed, run in runs.items():
            console.out.print(f"seed {seed}", soft_wrap=True)
            whole = train(config_path, [*overrides, f"run.seed={seed}"], run, fresh, parent_id)
            if not whole:
                status = "KILLED"
                return False
        result = _spread(config, runs)
        _write(folder, runs, result)
        status = "FINISHED"
    finally:
        if parent is not None:
            _close(parent, folder, list(runs.values()), status)
    _show(config, folder, result)
    return True


def _folder(run_dir: str | Path) -> Path:
    if str(run_dir).startswith("s3://"):
        raise InputError(
            f"--run-dir {run_dir}: --seeds keeps its runs beside each other in a folder; give a path, or train each seed by itself"
        )
    return local_path(run_dir)


def _check_usable(folder: Path) -> None:
    if (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} holds a single run, and --seeds writes several beside each other; choose another --run-dir"
        )
    foreign = [entry.name for entry in folder.iterdir() if not _is_ours(entry)] if folder.is_dir() else []
    if foreign:
        raise InputError(
            f"{folder} is not empty and holds no repeats (it holds {min(foreign)!r}); choose another --run-dir"
        )


def _is_ours(entry: Path) -> bool:
    names = (RESULT, PAGE, "mlflow.json", LOCK)
    return entry.name in names or (entry.name.startswith("seed-") and entry.is_dir()) or entry.suffix == ".part"


def _clear(folder: Path) -> None:
    """Forget what an earlier start came to; the runs are cleared one by one."""
    for entry in folder.iterdir():
        if entry.name in (RESULT, PAGE, "mlflow.json"):
            entry.unlink()


def _parent(config: ExperimentConfig, folder: Path, seeds: int) -> MlflowParent | None:
    if not config.tracking.mlflow:
        return None
    parent = mlflow_parent(config, folder, {"seeds": seeds, **flatten(config)}, kind="repeats")
    try:
        parent.begin()
    except TrackingError as error:
        console.err.print(f"{error}; going on, and the runs become its children in the end", soft_wrap=True)
    return parent


def _spread(config: ExperimentConfig, runs: dict[int, Path]) -> dict[str, Any]:
    """What `seeds.json` holds."""
    summaries = {}
    for seed, path in runs.items():
        run = RunDirectory(path)
        summaries[seed] = run.read_json(run.summary_file)
    spreads: dict[str, Any] = {}
    for key in SPREADS:
        values = [summary[key] for summary in summaries.values()]
        spreads[key] = asdict(Spread.of(values)) if all(value is not None for value in values) else None
    kept = (
        "test_accuracy",
        "ci95",
        "test_accuracy_inductive",
        "val_accuracy",
        "meta_steps",
        "seconds",
        "params_sha256",
    )
    each = [
        {"seed": seed, "run": runs[seed].name, **{key: summary[key] for key in kept}}
        for seed, summary in summaries.items()
    ]
    return {"name": config.name, "spread": spreads, "seeds": each}


def _write(folder: Path, runs: dict[int, Path], result: dict[str, Any]) -> None:
    from imaml_dist.reporting.comparison import write_comparison

    RunDirectory(folder).write_json(folder / RESULT, result)
    write_comparison(list(runs.values()), folder / PAGE)


def _close(parent: MlflowParent, folder: Path, runs: list[Path], status: str) -> None:
    result = RunDirectory(folder).read_json(folder / RESULT) if status == "FINISHED" else None
    metrics = {
        f"{key}/{name}": value
        for key, spread in (result or {}).get("spread", {}).items()
        for name, value in (spread or {}).items()
        if value is not None
    }
    try:
        parent.close(status, [run for run in runs if run.is_dir()], metrics, artifacts=[folder / RESULT, folder / PAGE])
    except TrackingError as error:  # the runs are done and safe
        console.err.print(str(error), soft_wrap=True)


def _show(config: ExperimentConfig, folder: Path, result: dict[str, Any]) -> None:
    rows = {
        f"seed {one['seed']}": console.percent(one["test_accuracy"], one["ci95"])
        + f" after {one['meta_steps']} meta-steps in {one['seconds']:.0f} s"
        for one in result["seeds"]
    }
    for key, label in SPREADS.items():
        spread = result["spread"][key]
        if spread is not None:
            rows[f"{label}, mean of {spread['n']}"] = (
                f"{console.percent(spread['mean'], spread['ci95'])}, spread {100 * spread['sd']:.2f}"
            )
    rows["report"] = str(folder / PAGE)
    console.table(
        config.name,
        rows,
        "Behind a seed: 95% interval over its test tasks. Behind a mean: 95% interval over seeds, by Student's t; spread is the "
        "standard deviation between seeds, in points.",
    )
