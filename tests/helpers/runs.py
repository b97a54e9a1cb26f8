"""Small training runs for tests: a tiny network on made images, seconds instead of minutes."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import resolve
from imaml_dist.distributed.group import Alone, Group, ProcessGroup
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import ImamlError
from imaml_dist.storage.options import StorageOptions
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource
from imaml_dist.tracking import metrics_file
from imaml_dist.training import checkpoints
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of


def raw_config(data: Path, **run: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {"url": str(data), "way": 3, "shot": 1, "query": 2},
        "model": {"kind": "conv4", "channels": 8},
        "algorithm": {"kind": "imaml", "inner": {"steps": 3}, "solver": {"max_iterations": 2}},
        "run": {"steps": 6, "tasks_per_step": 8, "chunk": 2, "checkpoint_every": 2, "backend": "local", **run},
        "validate": {"every": 3, "tasks": 12},
        "evaluate": {"tasks": 20, "query": 5},
        "tracking": {"mlflow": False},
    }


def write_config(path: Path, data: Path, **run: Any) -> Path:
    path.write_text(yaml.safe_dump(raw_config(data, **run)))
    return path


def tiny(data: Path, *overrides: str, **run: Any) -> ExperimentConfig:
    return resolve(build_config(raw_config(data, **run), overrides), cuda=False)


def train_alone(config: ExperimentConfig, path: Path) -> dict[str, Any]:
    run = RunDirectory(path)
    run.begin(config)
    Worker(config, run, Alone()).run_to_end()
    return fingerprint(path)


def train_in_a_group(raw: dict[str, Any], path: str) -> None:
    """For `helpers.gloo.run_group`: one rank of a begun run."""
    Worker(resolve(build_config(raw), cuda=False), RunDirectory(Path(path)), ProcessGroup()).run_to_end()


class Spoilt:
    """A `TaskSource` some of whose tasks hold a number that is not finite: `bad[step]` of them, the first ones."""

    def __init__(self, source: TaskSource, bad: dict[int, int]) -> None:
        self.source, self.bad = source, bad

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        episodes = self.source.episodes(step, tasks)
        episodes.support_x[episodes.index < self.bad.get(step, 0)] = torch.nan
        return episodes


def spoilt_worker(config: ExperimentConfig, path: Path, group: Group, bad: dict[int, int]) -> Worker:
    """One rank of a begun run, some of whose tasks are bad."""
    worker = Worker(config, RunDirectory(path), group)
    worker.train_source = Spoilt(worker.train_source, bad)
    return worker


def train_spoilt_in_a_group(raw: dict[str, Any], path: str, bad: dict[int, int]) -> None:
    """As `train_in_a_group`, with bad tasks."""
    spoilt_worker(resolve(build_config(raw), cuda=False), Path(path), ProcessGroup(), bad).run_to_end()


def train_in_a_group_with_slow_disk(raw: dict[str, Any], path: str) -> None:
    """As `train_in_a_group`, but a checkpoint takes a second to write."""
    save = checkpoints.save

    def slow(*args: Any) -> Path:
        time.sleep(1.0)
        return save(*args)

    checkpoints.save = slow
    train_in_a_group(raw, path)


def error_of_training(raw: dict[str, Any], path: str) -> str:
    """What training says as it refuses to begin."""
    try:
        train_in_a_group(raw, path)
    except ImamlError as error:
        return str(error)
    return ""


def fingerprint(path: Path) -> dict[str, Any]:
    """What the same-bits promise is about."""
    tensors, facts = checkpoints.load_newest(path / "checkpoints")
    return fingerprint_of(tensors, facts, json.loads((path / "evaluation.json").read_text()))


def fingerprint_of(tensors: dict[str, Tensor], facts: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The same, of a state and a meta-test."""
    return {
        "params": sha256_of({n: t for n, t in tensors.items() if n.startswith("model.")}),
        "state": sha256_of(tensors),
        "ledger": facts["ledger"],
        "best": facts["best"],
        "test": evaluation["trained"]["per_task"],
    }


def seen_elsewhere(url: str, options: StorageOptions) -> tuple[dict[str, Any], list[int]]:
    """What a process finds that knows only the URL of a run: (fingerprint, steps on record)."""
    run = open_run(url, options)
    run.collect()
    newest = run.newest_checkpoint()
    assert newest is not None
    tested = run.read_json(run.evaluation_file) or {"trained": {"per_task": None}}
    return fingerprint_of(*newest, tested), [record["step"] for record in metrics_file.read(run.metrics_file)]
