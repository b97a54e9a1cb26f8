"""One cell of `operators.py`: meta-train with its settings, test on the way, look at the curvature at the end; and cells in turns."""

import argparse
import json
import math
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imaml_dist.algorithms.imaml import IMAML
from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.load import build_config, read_mapping
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.core.curvature import hessian_operator
from imaml_dist.core.linear.system import ProximalSystem
from imaml_dist.core.spectrum import lanczos
from imaml_dist.data.dataset import Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.distributed import schedules
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process, resolve
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.meta_step import MetaStep
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.outer import make_optimizer
from imaml_dist.training.state import MetaState

AVERAGE = 20
"""Steps over which the iterates are averaged, with weights that decay; a constant rate alone leaves them noisy."""

BEYOND = 1.5
"""Training goes on for so many times the seconds of the comparison, for a task costs more on a busy machine than it does in turns."""

PROBED = 8

WATCHED = ("stationarity", "cg_residual", "cosine", "distance", "support_loss", "cg_negative_curvature", "excluded")

Cell = dict[str, Any]


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What a cell's result depends on besides its settings."""
    numbers = {key: getattr(options, key) for key in ("tasks", "seconds", "every", "test_tasks")}
    return {**numbers, "extra": options.extra} if options.extra else numbers


def place(options: argparse.Namespace, name: str) -> Path:
    """The file of a cell."""
    return Path(options.out, f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.json")


def configured(options: argparse.Namespace, overrides: list[str], *, query: int | None = None) -> ExperimentConfig:
    """The cell's configuration, resolved; with another number of queries for testing."""
    raw = read_mapping(options.config)
    alike = [
        f"data.url={options.data}",
        "outer.schedule=constant",
        "run.workers=1",
        "run.steps=1000000",
        "tracking.mlflow=false",
        *options.extra,
    ]
    more = [] if query is None else [f"data.query={query}"]
    return resolve(build_config(raw, [*alike, *overrides, *more]), cuda=False)


def accuracy(learner: MetaLearner, source: EpisodeSource, tasks: int, theta: Tensor) -> tuple[float, float]:
    """Mean over tasks, queries classified together, and its 95% interval."""
    found: list[float] = []
    for begin in range(0, tasks, 8):
        episodes = source.episodes(0, range(begin, min(begin + 8, tasks)))
        phi = learner.adapt_parameters(episodes.support_x, episodes.support_y, theta).params
        with torch.no_grad():
            right = learner.functional.predict(phi, episodes.query_x).argmax(-1) == episodes.query_y
        found += right.double().mean(-1).tolist()
    return statistics.fmean(found), 1.96 * statistics.stdev(found) / math.sqrt(len(found))


def curvature(config: ExperimentConfig, theta: Tensor, updates: int) -> dict[str, Any]:
    """Smallest Ritz values of H + Lambda where the cell's own inner solver ends, and its stationarity there, in float64."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"precision": "float64"})})
    source = make_source(config, open_dataset(config), "val")
    learner = make_learner(config, source.image_shape, updates)
    if not isinstance(learner.algorithm, IMAML):
        return {}
    lowest: list[float] = []
    reached: list[float] = []
    for task in range(PROBED):
        whole = learner.problem(source.episodes(0, range(task, task + 1)), theta.double())
        part = learner.algorithm.part(whole)
        inner = learner.algorithm.adapt(whole)
        proximal = learner.algorithm.proximal(part.problem)
        phi = inner.params[:, part.places]
        system = ProximalSystem(hessian_operator(part.problem.support_loss, phi), proximal)
        start = torch.randn(1, phi.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(task))
        lowest.append(float(lanczos(system, start, steps=50).smallest))
        reached.append(float(inner.stationarity))
    return {"ritz": lowest, "stationarity_float64": reached}


class Training:
    """A cell's meta-training, as `imaml train` steps, without its files; at given meta-parameters where it was trained before."""

    def __init__(
        self, config: ExperimentConfig, dataset: Dataset, average: Tensor | None = None, updates: int = 0
    ) -> None:
        prepare_process(config)
        self.config, self.source = config, make_source(config, dataset, "train")
        self.learner = make_learner(config, self.source.image_shape)
        learned = meta_parameters(self.learner)
        if average is not None:
            with torch.no_grad():
                for name, value in learned.layout.unflatten(average).items():
                    learned.learned()[name].copy_(value)
        cap = schedules.first_cap(config.algorithm)
        self.state = MetaState(learned, make_optimizer(learned, config.outer), cap=cap, updates=updates)
        self._step = MetaStep(config, self.learner, self.state, Alone())

    @property
    def per_step(self) -> int:
        """Tasks of a meta-step."""
        return self.config.run.tasks_per_step

    def step(self) -> dict[str, Any]:
        """One meta-step; its line of metrics."""
        number, chunk = self.state.step, self.config.run.chunk
        batches = (self.source.episodes(number, range(t, t + chunk)) for t in range(0, self.per_step, chunk))
        return dict(self._step.take(number, batches))


def run_cell(options: argparse.Namespace, name: str, overrides: list[str], file: Path) -> Cell:
    """Train and test; the result is written at once."""
    torch.set_num_threads(1)
    config = configured(options, overrides)
    with closing(open_dataset(config)) as dataset:
        training = Training(config, dataset)
        learner, state = training.learner, training.state
        unseen = make_source(configured(options, overrides, query=15), dataset, "val")
        learner.task_gradients(
            training.source.episodes(0, range(config.run.chunk))
        )  # what a first call tries and compiles
        average, seconds = learner.meta_parameters(), 0.0
        points: list[dict[str, float]] = []
        records: list[dict[str, Any]] = []
        going = True
        while going:
            began = time.process_time()
            records.append(training.step())
            before, seconds = seconds, seconds + time.process_time() - began
            weight = max(1.0 / AVERAGE, 1.0 / state.step)
            average = (1.0 - weight) * average + weight * learner.meta_parameters()
            tasks = state.step * training.per_step
            going = tasks < options.tasks or seconds < BEYOND * options.seconds
            due = (tasks % options.every == 0 and tasks <= options.tasks) or before < options.seconds <= seconds
            if due or not going:
                mean, ci95 = accuracy(learner, unseen, options.test_tasks, average)
                points.append({"tasks": tasks, "seconds": seconds, "accuracy": mean, "ci95": ci95})
    last = records[-AVERAGE:]
    watched = {key: statistics.fmean(r[key] for r in last if key in r) for key in WATCHED if key in last[0]}
    found = {
        "name": name,
        "overrides": overrides,
        "asked": asked(options),
        "points": points,
        "tasks_per_second": state.step * training.per_step / seconds,
        "updates": state.updates,
        "skipped": state.step - state.updates,
        **watched,
        **curvature(config, average, state.updates),
    }
    save_file({"average": average}, file.with_suffix(".safetensors"))
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(file)
    return found


def in_turns(options: argparse.Namespace, cells: list[Cell], turns: int) -> None:
    """Seconds that a task costs in each cell, whole meta-steps, the median over turns; written into the cells.

    Cells that were timed are timed again, so that all are in the same turns; every other turn goes backwards.
    """
    if not cells or not turns:
        return
    torch.set_num_threads(1)
    with closing(open_dataset(configured(options, cells[0]["overrides"]))) as dataset:
        trainings = []
        for cell in cells:
            average = load_file(place(options, cell["name"]).with_suffix(".safetensors"))["average"]
            trainings.append(Training(configured(options, cell["overrides"]), dataset, average, cell["updates"]))
        taken: list[list[float]] = [[] for _ in cells]
        for turn in range(turns + 1):
            order = range(len(cells)) if turn % 2 else reversed(range(len(cells)))
            for number in order:
                began = time.process_time()
                trainings[number].step()
                if turn:  # the first one tries and compiles
                    taken[number].append((time.process_time() - began) / trainings[number].per_step)
    for cell, seconds in zip(cells, taken, strict=True):
        cell["seconds_per_task"] = statistics.median(seconds)
        cell["tasks_per_second"] = 1 / cell["seconds_per_task"]
        for point in cell["points"]:
            point["seconds"] = point["tasks"] * cell["seconds_per_task"]
