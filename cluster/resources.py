"""How many equal workers a Ray cluster has room for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def nodes() -> list[dict[str, float]]:
    """What each living node of the connected cluster offers."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def room(offered: Iterable[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """Workers that fit, each whole on one node, and whole on one GPU if it takes a part of one.

    Args:
        offered: by each node.
        worker: what one needs, more than 0 of something.
    """
    return sum(min(_times(node.get(kind, 0.0), wanted, kind) for kind, wanted in worker.items()) for node in offered)


def _times(there: float, wanted: float, kind: str) -> int:
    each = 1e-4  # Ray's own grain
    if kind == "GPU" and wanted < 1:
        return math.floor(there) * math.floor((1 + each) / wanted)
    return math.floor((there + each) / wanted)
