"""Gaussian blobs: an endless classification `TaskSource` in float64."""

import torch

from imaml_dist.tasks.episode import EpisodeBatch

WAY = 3


class Blobs:
    """4 support samples a class and as many queries as asked for, ordered by class."""

    def __init__(self, queries: int = 4) -> None:
        self.queries = queries

    def episodes(self, step, tasks):
        parts = []
        for task in tasks:
            generator = torch.Generator().manual_seed(1000 * step + task)
            centres = torch.randn(WAY, 1, 1, 4, generator=generator, dtype=torch.float64)
            drawn = []
            for count in (4, self.queries):
                y = torch.arange(WAY).repeat_interleave(count)
                noise = torch.randn(count * WAY, 1, 1, 4, generator=generator, dtype=torch.float64)
                drawn += [centres[y] + 0.3 * noise, y]
            parts.append(drawn)
        return EpisodeBatch(*(torch.stack(p) for p in zip(*parts, strict=True)), index=torch.tensor(list(tasks)))
