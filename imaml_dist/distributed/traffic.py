"""What all workers have asked of object storage and of their nodes' caches, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from imaml_dist.data.cache import CacheCounters
from imaml_dist.storage.patience import counters

KEYS = ("s3_requests", "s3_retries", "s3_bytes", "s3_seconds_waited", "cache_hits", "cache_misses")
"""As in the metrics of a step: numbers of requests and of tries after a failure, bytes fetched, seconds of waiting before such
tries, and blocks of class records found in the node's cache or not."""


class Traffic:
    """Differences of this worker's counters.

    Args:
        cached: counters of the data set's cache; None where the data set is not in object storage.
    """

    def __init__(self, cached: CacheCounters | None) -> None:
        self._cached = cached
        self._before = self._now()

    def since_last(self) -> list[float]:
        """One number per key."""
        before, self._before = self._before, self._now()
        return [now - earlier for now, earlier in zip(self._before, before, strict=True)]

    def summed(self, of_ranks: Sequence[Sequence[float]]) -> dict[str, float]:
        """Over ranks, by key; nothing where the data set is not in object storage."""
        if self._cached is None:
            return {}
        return {key: sum(column) for key, column in zip(KEYS, zip(*of_ranks, strict=True), strict=True)}

    def _now(self) -> list[float]:
        asked = counters.snapshot()
        cached = self._cached or CacheCounters()
        names = ("requests", "retries", "bytes_read", "seconds_waited")
        return [*(asked[name] for name in names), cached.hits, cached.misses]
