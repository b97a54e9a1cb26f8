"""How busy this machine is, under MLflow's own names: processors, memory, disk, network, and this process's GPU."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import psutil
import torch

OF_NODE = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
)
"""Facts of a whole machine; network since the monitor began."""

OF_GPU = ("gpu_memory_usage_megabytes", "gpu_memory_usage_percentage", "gpu_utilization_percentage")
"""Facts of one GPU; the last one only where the package `nvidia-ml-py` is installed."""

_MB = 1e6
_DISK = "/"


class SystemMonitor:
    """Looks every now and then; a look takes about a millisecond.

    Args:
        every: seconds between two looks; 0 is never.
        whole_node: whether to look at the machine, or only at the GPU.
        gpu: whether this process computes on one.
    """

    def __init__(self, every: float, *, whole_node: bool, gpu: bool) -> None:
        self._every, self._whole_node = every, whole_node
        self._gpu = gpu
        self._looked = time.monotonic()
        self._network = _network()
        psutil.cpu_percent()  # the first call only begins to measure

    def sample(self) -> list[float]:
        """In the order of `OF_NODE`, then `OF_GPU`; nan where it is not time yet, or where there is nothing to look at."""
        node, gpu = [math.nan] * len(OF_NODE), [math.nan] * len(OF_GPU)
        now = time.monotonic()
        if self._every > 0 and now - self._looked >= self._every:
            self._looked = now
            node = self._node() if self._whole_node else node
            gpu = _gpu() if self._gpu else gpu
        return node + gpu

    def _node(self) -> list[float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(_DISK), _network()
        return [
            psutil.cpu_percent(),
            (memory.total - memory.available) / _MB,
            memory.percent,
            disk.percent,
            disk.free / _MB,
            *((now - before) / _MB for now, before in zip(network, self._network, strict=True)),
        ]


def _network() -> tuple[int, int]:
    """Bytes received and sent; a machine without network has none."""
    counted = psutil.net_io_counters()
    return (counted.bytes_recv, counted.bytes_sent) if counted is not None else (0, 0)


def _gpu() -> list[float]:
    free, total = torch.cuda.mem_get_info()
    busy = math.nan
    with suppress(Exception):  # torch asks nvidia-ml-py, which may be missing, or not be allowed to say
        busy = float(torch.cuda.utilization())
    return [(total - free) / _MB, 100.0 * (total - free) / total, busy]
