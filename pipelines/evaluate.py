"""`imaml evaluate`: meta-test the best checkpoint of a run on unseen tasks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed.build import make_learner, make_source, prepare_process
from imaml_dist.errors import ConfigError
from imaml_dist.training import checkpoints
from imaml_dist.training.evaluation import evaluate
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory
from pipelines import console, kernels


def evaluate_run(path: Path, split: str, tasks: int) -> dict[str, Any]:
    """Mean accuracy, 95% interval and accuracy per task of the best checkpoint, transductive and inductive.

    Raises:
        InputError: no such run, split or checkpoint.
    """
    sys.path.insert(0, os.getcwd())
    if split not in ("train", "val", "test") or tasks < 1:
        raise ConfigError(
            f"--split {split} --tasks {tasks}: the split is one of train, val, test, and tasks is at least 1"
        )
    run = RunDirectory(path)
    config = run.config()
    if config.run.device == "cuda" and not torch.cuda.is_available():
        config = config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})
    if config.run.execution == "native" and not kernels.usable():
        config = config.model_copy(update={"run": config.run.model_copy(update={"execution": "vmap"})})
    prepare_process(config)
    source = make_source(config, Dataset(config.data.url), split)
    learner = make_learner(config, source.image_shape)
    step = run.best_checkpoint()
    tensors, _ = checkpoints.load(checkpoints.path_of(run.checkpoints, step))
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
            "tasks": str(tasks),
            "accuracy": console.percent(result.mean, result.ci95),
            "accuracy, inductive": console.percent(alone["mean"], alone["ci95"]),
            "checkpoint of step": str(step),
        },
        console.TWO_ACCURACIES,
    )
    return {
        "split": split,
        "tasks": tasks,
        "step": step,
        "accuracy": result.mean,
        "ci95": result.ci95,
        "per_task": result.per_task,
        "accuracy_inductive": alone["mean"],
        "ci95_inductive": alone["ci95"],
        "per_task_inductive": alone["per_task"],
    }
