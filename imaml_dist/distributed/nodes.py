"""How busy the machines of a run are: its first rank tells of each one, every rank of its own GPU."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import torch

from imaml_dist.distributed.group import Group
from imaml_dist.tracking.system import OF_GPU, OF_NODE, SystemMonitor

COLUMNS = len(OF_NODE) + len(OF_GPU)
"""Numbers that a rank tells."""

_LONGEST_NAME = 64


class Nodes:
    """This rank's part in it. Made by all ranks together.

    Args:
        group: the workers.
        every: seconds between two looks; 0 is never.
        gpu: whether ranks compute on one.
    """

    def __init__(self, group: Group, every: float, gpu: bool = False) -> None:
        mine = socket.gethostname().encode()[:_LONGEST_NAME].ljust(_LONGEST_NAME, b"\0")
        told = group.gather(torch.tensor(list(mine), dtype=torch.int64))
        self._names = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in told]
        first = self._names.index(self._names[group.rank]) == group.rank
        self._monitor = SystemMonitor(every, whole_node=first, gpu=gpu)

    def told(self) -> list[float]:
        """This rank's columns."""
        return self._monitor.sample()

    def metrics(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """`system/<node>/<name>` from what all ranks have told: megabytes of GPUs are added up, percentages averaged."""
        found: dict[str, list[float]] = {}
        for node, row in zip(self._names, rows, strict=True):
            for name, value in zip((*OF_NODE, *OF_GPU), row, strict=True):
                if not math.isnan(value):
                    found.setdefault(f"system/{node}/{name}", []).append(value)
        return {
            name: sum(values) if name.endswith("_megabytes") else sum(values) / len(values)
            for name, values in found.items()
        }
