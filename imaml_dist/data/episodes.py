"""Episodes drawn from a data set: task t of meta-step s is the same on every machine and in every order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imaml_dist.data.augment import Augmentation, augmented, image_draws
from imaml_dist.data.dataset import Dataset
from imaml_dist.data.philox import Domain, Stream
from imaml_dist.data.pools import ClassPools
from imaml_dist.data.records import Images
from imaml_dist.errors import ConfigError
from imaml_dist.tasks.episode import EpisodeBatch

DROPOUT = 1
"""Sub-stream of a task from which its dropout masks follow; 0 draws the episode."""

DOMAINS = {"train": Domain.TRAIN, "val": Domain.VAL, "test": Domain.TEST}


def draw_episode(
    seed: int,
    domain: int,
    step: int,
    task: int,
    counts: list[int],
    *,
    way: int,
    shot: int,
    query: int,
    pool: Sequence[int] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Class ids and image numbers of one N-way K-shot episode.

    Classes are drawn without replacement; then, per class in drawn order, K + Q distinct images, of which the first K
    are the support. The label of a class is its position in drawn order.

    Args:
        seed, domain, step, task: the stream's key and counter (`philox.Stream`).
        counts: number of images of every class in canonical order.
        way: N. shot: K. query: Q per class.
        pool: class ids to choose from; None is all.

    Returns:
        N class ids, and for each the K + Q image numbers.
    """
    stream = Stream(seed, domain, step, task)
    among = range(len(counts)) if pool is None else pool
    classes = [among[i] for i in stream.sample(len(among), way)]
    return classes, [stream.sample(counts[c], shot + query) for c in classes]


class EpisodeSource:
    """A `TaskSource` over one split of a data set.

    Pixels come out in [0, 1], 1 being full ink, `[T, n, C, H, W]`; samples are ordered by class.

    Args:
        dataset: opened data set.
        split: train, val or test.
        way: N. shot: K. query: Q per class.
        seed: of all draws.
        dtype: of pixels.
        augmentation: of every image, support and query alike; for training.
        pool: P >= N, draw the classes of `pool_steps` meta-steps from P of the split's; None draws from all.
        pool_steps: see `pool`, >= 1.

    Raises:
        ConfigError: more ways than classes, a pool that is too large or too small, K + Q larger than the smallest class,
            or an augmentation that the images cannot undergo.
        DataError: no such split.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        way: int,
        shot: int,
        query: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation | None = None,
        pool: int | None = None,
        pool_steps: int = 100,
    ) -> None:
        self._dtype = dtype
        self.dataset, self.split = dataset, split
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        self._classes = dataset.classes(split)
        self._counts = [c.shape[0] for c in self._classes]
        if len(self._classes) < 2:
            raise ConfigError(
                f"data.url: the {split} split of {dataset.url} has one class, an episode needs {way}; prepare the data set again with "
                "more classes in it (--parts)"
            )
        if way > len(self._classes):
            raise ConfigError(
                f"data.way: {way} classes per episode, but the {split} split of {dataset.url} has {len(self._classes)}; "
                f"choose 2 to {len(self._classes)}"
            )
        if shot + query > min(self._counts):
            raise ConfigError(
                f"data.shot + query: {shot} + {query} images per class, but the smallest class of the {split} split of "
                f"{dataset.url} has {min(self._counts)}; choose fewer"
            )
        if pool is not None and not way <= pool <= len(self._classes):
            raise ConfigError(
                f"data.pool: {pool} classes given, but an episode has {way} and the {split} split of {dataset.url} "
                f"{len(self._classes)}; choose {way} to {len(self._classes)}, or null for all"
            )
        self._pools = None if pool is None else ClassPools(seed, len(self._classes), pool, pool_steps)
        self._augmentation = augmentation or Augmentation()
        self._augmentation.check(self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        return self.dataset.index.image_shape

    def draw(self, step: int, task: int) -> tuple[list[int], list[list[int]]]:
        """Class ids and image numbers of a task."""
        return draw_episode(
            self.seed,
            DOMAINS[self.split],
            step,
            task,
            self._counts,
            way=self.way,
            shot=self.shot,
            query=self.query,
            pool=None if self._pools is None else self._pools.at(step),
        )

    def class_key(self, class_id: int) -> str:
        """The key of a class by its canonical id."""
        return self._classes[class_id].key

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        """See `TaskSource.episodes`."""
        drawn = [self.draw(step, task) for task in tasks]
        wanted = [(self._classes[c], n) for classes, numbers in drawn for c, n in zip(classes, numbers, strict=True)]
        images = np.concatenate(self.dataset.gather(wanted))
        if self._augmentation != Augmentation():
            per_task = self.way * (self.shot + self.query)
            draws = [image_draws(self.seed, step, task, per_task) for task in tasks]
            images = augmented(images, np.concatenate(draws), self._augmentation)
        return EpisodeBatch(
            support_x=self._pixels(images, slice(self.shot)),
            support_y=self._labels(len(tasks), self.shot),
            query_x=self._pixels(images, slice(self.shot, None)),
            query_y=self._labels(len(tasks), self.query),
            index=torch.tensor(list(tasks), dtype=torch.int64),
            key=torch.tensor([self._key(step, task) for task in tasks], dtype=torch.int64),
        )

    def _key(self, step: int, task: int) -> int:
        """63 bits of the task's own word for dropout masks."""
        return Stream(self.seed, DOMAINS[self.split], step, task, ordinal=DROPOUT).u64() >> 1

    def _labels(self, tasks: int, per_class: int) -> Tensor:
        return torch.arange(self.way).repeat_interleave(per_class).repeat(tasks, 1)

    def _pixels(self, images: Images, part: slice) -> Tensor:
        """A part of every class's images, of uint8 `[T * N * (K + Q), H, W, C]` -> `[T, n, C, H, W]` in [0, 1]."""
        per_class = images.reshape(-1, self.way, self.shot + self.query, *images.shape[1:])[:, :, part]
        pixels = torch.from_numpy(per_class).flatten(1, 2).movedim(-1, 2)
        return pixels.to(self._dtype, memory_format=torch.contiguous_format).div_(255.0)
