"""Episodes in the order in which they will be asked for, made by threads while the caller computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from imaml_dist.tasks.episode import EpisodeBatch, TaskSource

THREADS = 4
"""At most; most of their time they wait for storage."""


class Ahead:
    """An iterator over episode batches that keeps the next ones ready. What it yields does not depend on how far ahead it is.

    Args:
        source: pure in (step, tasks), as task sources are.
        requests: (step, tasks) of every batch, in order; may be endless.
        depth: batches ready or in the making; 0 makes each when it is asked for.
        pin: memory, from which copies to a GPU overlap with its work.
    """

    def __init__(
        self, source: TaskSource, requests: Iterable[tuple[int, range]], depth: int, *, pin: bool = False
    ) -> None:
        self._source, self._requests, self._depth, self._pin = source, iter(requests), depth, pin
        self._pool = ThreadPoolExecutor(min(depth, THREADS), "episodes") if depth else None
        self._coming: deque[Future[EpisodeBatch]] = deque()
        self._refill()

    def __iter__(self) -> Iterator[EpisodeBatch]:
        return self

    def __next__(self) -> EpisodeBatch:
        """The next batch; raises what making it raised."""
        if self._pool is None:
            return self._made(*next(self._requests))
        if not self._coming:
            raise StopIteration
        batch = self._coming.popleft()
        self._refill()
        return batch.result()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what they are making is thrown away."""
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _refill(self) -> None:
        if self._pool is not None:
            for request in islice(self._requests, self._depth - len(self._coming)):
                self._coming.append(self._pool.submit(self._made, *request))

    def _made(self, step: int, tasks: range) -> EpisodeBatch:
        batch = self._source.episodes(step, tasks)
        return batch.pinned() if self._pin else batch
