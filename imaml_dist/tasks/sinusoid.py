"""Regression tasks: sine waves of random amplitude and phase, the field's first few-shot regression problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from imaml_dist.tasks.episode import EpisodeBatch


@dataclass(frozen=True)
class Sinusoids:
    """A `TaskSource` of `y = a sin(x - b)`: a in [0.1, 5], b in [0, pi], x in [-5, 5], all uniform; one a and b per task.

    Inputs and targets are `[T, n, 1]`.

    Attributes:
        shots: support samples per task.
        queries: query samples per task.
        seed: of all draws.
        dtype: of inputs and targets.

    Source: Finn et al., "Model-agnostic meta-learning" (2017), section 5.1.
    """

    shots: int = 10
    queries: int = 10
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        """See `TaskSource.episodes`."""
        drawn, keys = [], []
        for task in tasks:
            # One generator per task, seeded by an injective number of (seed, step, task) for up to 2^20 tasks and steps.
            keys.append(((self.seed << 40) + (step << 20) + task) & ((1 << 63) - 1))
            generator = torch.Generator().manual_seed(keys[-1])
            drawn.append(torch.rand(2 + self.shots + self.queries, generator=generator, dtype=torch.float64))
        uniform = torch.stack(drawn)
        amplitude, phase = 0.1 + 4.9 * uniform[:, :1], math.pi * uniform[:, 1:2]
        inputs = 10.0 * uniform[:, 2:] - 5.0
        x, y = (v.to(self.dtype).unsqueeze(-1) for v in (inputs, amplitude * torch.sin(inputs - phase)))
        return EpisodeBatch(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            index=torch.tensor(list(tasks), dtype=torch.int64),
            key=torch.tensor(keys, dtype=torch.int64),
        )
