"""Accuracy on unseen tasks, computed by all workers together, and the meta-test that ends a run."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import MetaLearner
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.distributed import progress
from imaml_dist.distributed.build import make_learner, make_source, read_ahead
from imaml_dist.distributed.chunks import chunks_of, even_deal
from imaml_dist.distributed.group import Group, first_rank_decides
from imaml_dist.distributed.memory import checkpoint_of_first_rank
from imaml_dist.distributed.reduction import gather_chunks
from imaml_dist.tasks.episode import EpisodeBatch, TaskSource
from imaml_dist.training.evaluation import COLUMNS, TASKS_AT_ONCE, Evaluation, predict_queries, task_scores
from imaml_dist.training.meta_parameters import meta_parameters
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import updates_of


def shared_accuracy(
    config: ExperimentConfig, group: Group, learner: MetaLearner, source: TaskSource, tasks: int
) -> Evaluation:
    """`training.evaluation.evaluate`, its chunks dealt to the workers; the same result on every rank and number of ranks.

    Raises:
        InputError: on every rank alike, if tasks of any rank cannot be used.
    """
    device = next(learner.model.parameters()).device
    chunks = chunks_of(tasks, TASKS_AT_ONCE)
    deal = even_deal(group.world, len(chunks))
    dealt = deal[group.rank]
    mine = torch.zeros(len(dealt), TASKS_AT_ONCE, COLUMNS, dtype=torch.float64)
    with read_ahead(config, source, ((0, chunks[number]) for number in dealt)) as coming:
        for row, episodes in enumerate(coming):
            with progress.computing():
                scores = task_scores(learner, episodes.to(device))
                mine[row, : len(scores)] = scores.cpu()
    rows = gather_chunks(group, mine, deal).tolist()
    return Evaluation.of_rows([a for row, chunk in zip(rows, chunks, strict=True) for a in row[: len(chunk)]])


def meta_test(
    config: ExperimentConfig, run: RunDirectory, group: Group, dataset: Dataset, split: str = "test"
) -> dict[str, Any] | None:
    """Evaluate the best checkpoint beside the same network without meta-training, adapted the same way.

    "Without meta-training" is the plain initial network of the seed, with the algorithm's own parameters as configured,
    also in a run that began with a warm start. Both adapt with the lambda that the checkpoint's schedule has come to.

    Rank 0 writes the result to `evaluation.json`, with one episode and its predictions for people to look at.

    Returns:
        `{split, way, shot, query, tasks, step, trained, untrained, episode}`; the same on every rank but for `episode`,
        which only rank 0 has. None if a stop was requested before the last part had begun.

    Raises:
        CheckpointError: no checkpoint, or the best one does not verify.
        ConfigError, DataError: the split does not have such episodes.
    """
    source = make_source(config, dataset, split)
    # Rank 0 chooses, for it alone knows that what it has written is whole.
    step = first_rank_decides(group, run.best_checkpoint)
    tensors, facts = checkpoint_of_first_rank(group, run, step)
    untrained, trained = (make_learner(config, source.image_shape, updates_of(facts)) for _ in range(2))
    meta_parameters(trained).load(tensors)
    results = []
    for learner in (untrained, trained):
        if first_rank_decides(group, lambda: int(run.stop_file.exists())):
            return None
        results.append(shared_accuracy(config, group, learner, source, config.evaluate.tasks))
    before, after = results
    result: dict[str, Any] = {
        "split": split,
        "way": config.data.way,
        "shot": config.data.shot,
        "query": config.evaluate.query,
        "tasks": config.evaluate.tasks,
        "step": step,
        "trained": after.to_dict(),
        "untrained": before.to_dict(),
    }
    if group.rank == 0:
        episodes = source.episodes(0, range(1)).to(config.run.device)
        classes, _ = source.draw(0, 0)
        result["episode"] = {
            "classes": [source.class_key(c) for c in classes],
            "shape": [source.image_shape[1], source.image_shape[2], source.image_shape[0]],
            "support": _pixels(episodes.support_x[0]),
            "support_labels": episodes.support_y[0].tolist(),
            "query": _pixels(episodes.query_x[0]),
            "query_labels": episodes.query_y[0].tolist(),
            "predictions": _predictions(trained, episodes),
            "untrained_predictions": _predictions(untrained, episodes),
        }
        run.write_json(run.evaluation_file, result)
        run.share(run.evaluation_file)
    return result


def _predictions(learner: MetaLearner, episodes: EpisodeBatch) -> list[int]:
    """Of the query images together; several classes have several, enough for batch statistics."""
    labels = predict_queries(learner, episodes).transductive
    assert labels is not None
    return [int(label) for label in labels[0]]


def _pixels(images: Tensor) -> str:
    """`[n, C, H, W]` in [0, 1] -> base64 of uint8 `[n, H, W, C]`."""
    return base64.b64encode((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy().tobytes()).decode()
