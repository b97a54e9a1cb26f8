"""What is told of machines: each by its first rank, when it is time, in units and bounds that make sense."""

import math
import socket

import torch

from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.nodes import COLUMNS, Nodes
from imaml_dist.tracking.system import OF_NODE

HERE = f"system/{socket.gethostname()}"


class Second:
    """The second of three ranks: the first is on the same machine, the third on another one."""

    rank, world = 1, 3

    def gather(self, mine):
        other = list(b"elsewhere".ljust(len(mine), b"\0"))
        return [mine, mine, torch.tensor(other)]


def test_the_first_rank_tells_of_its_machine_when_it_is_time():
    nodes = Nodes(Alone(), 1e-9)
    told = nodes.told()
    found = nodes.metrics([told])
    assert len(told) == COLUMNS and set(found) >= {f"{HERE}/{name}" for name in OF_NODE}
    for name, value in found.items():
        assert 0 <= value <= (100 if name.endswith("_percentage") else math.inf), name
    memory = found[f"{HERE}/system_memory_usage_megabytes"]
    assert 10 < memory < 1e9


def test_nothing_is_told_before_it_is_time_or_never():
    for every in (3600.0, 0.0):
        nodes = Nodes(Alone(), every)
        assert nodes.metrics([nodes.told()]) == {}


def test_other_ranks_leave_the_machine_to_the_first_and_gpus_are_summed_up():
    nodes = Nodes(Second(), 1e-9)
    assert all(math.isnan(value) for value in nodes.told()[: len(OF_NODE)])
    nothing = [math.nan] * len(OF_NODE)
    rows = [[*nothing, 1000.0, 10.0, 50.0], [*nothing, 2000.0, 20.0, math.nan], [*nothing, 5.0, 1.0, 1.0]]
    assert nodes.metrics(rows) == {
        f"{HERE}/gpu_memory_usage_megabytes": 3000.0,
        f"{HERE}/gpu_memory_usage_percentage": 15.0,
        f"{HERE}/gpu_utilization_percentage": 50.0,
        "system/elsewhere/gpu_memory_usage_megabytes": 5.0,
        "system/elsewhere/gpu_memory_usage_percentage": 1.0,
        "system/elsewhere/gpu_utilization_percentage": 1.0,
    }
