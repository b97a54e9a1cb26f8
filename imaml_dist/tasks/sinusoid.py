"""Regression tasks: sine waves of random amplitude and phase, the field's first few-shot regression problem."""

from __future__ import annotations

import hashlib
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
        words = torch.stack([_words(self.seed, step, task, 3 + self.shots + self.queries) for task in tasks])
        uniform = (words[:, 1:] >> 11 & (1 << 53) - 1).double() * 2.0**-53
        amplitude, phase = 0.1 + 4.9 * uniform[:, :1], math.pi * uniform[:, 1:2]
        inputs = 10.0 * uniform[:, 2:] - 5.0
        x, y = (v.to(self.dtype).unsqueeze(-1) for v in (inputs, amplitude * torch.sin(inputs - phase)))
        return EpisodeBatch(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            index=torch.tensor(list(tasks), dtype=torch.int64),
            key=words[:, 0] & (1 << 63) - 1,
        )


def _words(seed: int, step: int, task: int, count: int) -> torch.Tensor:
    """So many random int64 of a task. Torch's own generator on a CPU would use no more than the last 32 bits of a seed."""
    digest = hashlib.shake_256(f"{seed}/{step}/{task}".encode()).digest(8 * count)
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)
