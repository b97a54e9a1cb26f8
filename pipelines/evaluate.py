"""`imaml evaluate`: meta-test the best checkpoint of a run on unseen tasks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.frozen import FrozenTasks, Manifest, read_manifest
from imaml_dist.distributed.build import (
    dtype_of,
    make_learner,
    make_source,
    open_dataset,
    prepare_process,
    storage_options,
)
from imaml_dist.errors import ConfigError
from imaml_dist.training.evaluation import evaluate
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import updates_of
from pipelines import console, kernels

TASKS = 600
"""The field's custom."""


def check_choice(split: str, tasks: int) -> None:
    """Refuse options that choose nothing.

    Raises:
        ConfigError: no such split, or no task.
    """
    if split not in ("train", "val", "test") or tasks < 1:
        raise ConfigError(
            f"--split {split} --tasks {tasks}: the split is one of train, val, test, and tasks is at least 1"
        )


def opened(path: str | Path) -> tuple[RunDirectory, ExperimentConfig]:
    """A run with its configuration; what the user's own modules are imported from is importable.

    Raises:
        InputError: no such run.
    """
    sys.path.insert(0, os.getcwd())
    run = open_run(path)
    run.collect()
    return run, run.config()


def as_possible_here(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without a GPU, and without our own kernels, where this machine has none."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        config = config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})
    if config.run.execution == "native" and not kernels.usable():
        config = config.model_copy(update={"run": config.run.model_copy(update={"execution": "vmap"})})
    return config


def evaluate_run(
    path: str | Path, split: str | None = None, tasks: int | None = None, manifest: str | None = None
) -> dict[str, Any]:
    """Mean accuracy, 95% interval and accuracy per task of the best checkpoint, transductive and inductive.

    Args:
        path: run directory.
        split: train, val or test; None is that of the manifest, or test.
        tasks: how many; None is all of the manifest, or 600.
        manifest: file or URL of the frozen tasks to evaluate on.

    Raises:
        InputError: no such run, split or checkpoint, or a manifest that cannot be used with it.
    """
    run, config = opened(path)
    config = as_possible_here(config)
    prepare_process(config)
    frozen = None if manifest is None else _fitting(config, manifest, split, tasks)
    if frozen is None:
        split, tasks = split or "test", TASKS if tasks is None else tasks
        check_choice(split, tasks)
        source = make_source(config, open_dataset(config), split, training=False)
    else:
        split, tasks = frozen.split, len(frozen.tasks)
        source = FrozenTasks(open_dataset(config), frozen, dtype_of(config))
    step = run.best_checkpoint()
    tensors, facts = run.load_checkpoint(step)
    learner = make_learner(config, source.image_shape, updates_of(facts))
    meta_parameters(learner).load(tensors)
    with console.progress(f"evaluating {config.name} on {split}") as show:
        result = evaluate(
            learner, source, tasks, device=config.run.device, progress=lambda done, total: show(done, total, "")
        )
    alone = result.to_dict()["inductive"] or {"mean": None, "ci95": None, "per_task": None}
    console.table(
        config.name,
        {
            "split": split,
            "tasks": str(tasks) + ("" if frozen is None else f", sha256 {frozen.sha256[:12]}"),
            "accuracy": console.percent(result.mean, result.ci95),
            "accuracy, inductive": console.percent(alone["mean"], alone["ci95"]),
            "checkpoint of step": str(step),
        },
        console.TWO_ACCURACIES,
    )
    return {
        "split": split,
        "tasks": tasks,
        "manifest_sha256": None if frozen is None else frozen.sha256,
        "step": step,
        "accuracy": result.mean,
        "ci95": result.ci95,
        "per_task": result.per_task,
        "accuracy_inductive": alone["mean"],
        "ci95_inductive": alone["ci95"],
        "per_task_inductive": alone["per_task"],
    }


def _fitting(config: ExperimentConfig, url: str, split: str | None, tasks: int | None) -> Manifest:
    """The manifest, if it is what the other options say and the run can be evaluated on it."""
    manifest = read_manifest(url, storage_options(config))
    whole = manifest.split, len(manifest.tasks)
    asked = split or manifest.split, len(manifest.tasks) if tasks is None else tasks
    if asked != whole:
        raise ConfigError(
            f"--split {asked[0]} --tasks {asked[1]}: the manifest has {whole[1]} tasks of the {whole[0]} split and is used as a "
            "whole; leave the two options out"
        )
    if manifest.way != config.data.way:
        raise ConfigError(
            f"--manifest: its tasks have {manifest.way} classes, the run's model tells {config.data.way} apart; give a manifest "
            f"of {config.data.way}-way tasks"
        )
    return manifest
