"""What a run needs, what a cluster offers, whether the one fits into the other, and why not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imaml_dist.errors import ClusterError, ConfigError

_UNITS = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


@dataclass(frozen=True)
class Needs:
    """What a run asks of a cluster.

    Args:
        fewest: workers it cannot do without.
        most: workers it can make use of; 0 for none.
        cpus: of each worker, at least 1.
        gpus: of each worker; a part of 1 shares a GPU.
        memory: of each worker in bytes; 0 asks for none in particular.
    """

    fewest: int
    most: int
    cpus: float
    gpus: float = 0.0
    memory: float = 0.0

    @property
    def worker(self) -> dict[str, float]:
        """What one worker takes, in Ray's names, without what it does not take."""
        every = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {kind: amount for kind, amount in every.items() if amount > 0}


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


def misfit(needs: Needs, offered: Sequence[Mapping[str, float]]) -> str | None:
    """Why a cluster has no room for a run, in one sentence; None if it has.

    Args:
        needs: of the run.
        offered: by each node, in Ray's names.
    """
    fits = room(offered, needs.worker)
    if fits >= needs.fewest:
        return None
    one = _described(needs.worker)
    lacking = [kind for kind, wanted in needs.worker.items() if room(offered, {kind: wanted}) < needs.fewest]
    given = {kind: sum(node.get(kind, 0.0) for node in offered) for kind in needs.worker}
    asked = f"the run needs {needs.fewest} {_plural('worker', needs.fewest)} of {one} each"
    if not offered:
        return f"{asked}, but the cluster has no nodes; start some, or wait until they have come"
    has = f"the cluster's {len(offered)} {_plural('node', len(offered))} ({_described(given)} in all)"
    hint = "lower run.workers or run.threads, or add nodes"
    if not any(room([node], needs.worker) for node in offered):
        return f"{asked}, but none of {has} has room for even one; {hint}"
    short = " and ".join(lacking) or "no node has all kinds together"
    why = f"{short} fall short" if lacking else short
    return f"{asked}, but {has} have room for {fits}: {why}; {hint}"


def check_room(needs: Needs) -> None:
    """Make sure that the connected cluster has room for a run.

    Raises:
        ClusterError: it has not.
    """
    if (why := misfit(needs, nodes())) is not None:
        raise ClusterError(why)


def quantity(text: str | int | float, where: str) -> float:
    """A Kubernetes quantity (`500m`, `8Gi`, 2) as a number.

    Raises:
        ConfigError: it is none.
    """
    found = _QUANTITY.fullmatch(str(text))
    if found is None:
        raise ConfigError(f"{where}: {text!r} given, must be a Kubernetes quantity such as 500m, 2 or 8Gi")
    number, unit = found.groups()
    return float(number) * _UNITS[unit or ""]


def _times(there: float, wanted: float, kind: str) -> int:
    each = 1e-4  # Ray's own grain
    if kind == "GPU" and wanted < 1:
        return math.floor(there) * math.floor((1 + each) / wanted)
    return math.floor((there + each) / wanted)


def _described(amounts: Mapping[str, float]) -> str:
    parts = [f"{n / 2**30:.3g} GiB memory" if kind == "memory" else f"{n:g} {kind}" for kind, n in amounts.items()]
    return ", ".join(parts)


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"
