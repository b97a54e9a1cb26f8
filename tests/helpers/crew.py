"""Several keepers in threads of the test's process, with real rank processes: what Ray's actors do, without Ray."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imaml_dist.distributed.crew import Crew, connect, open_store
from imaml_dist.distributed.keeper import Keeper, Limits
from imaml_dist.distributed.rank_process import RankProcess
from imaml_dist.distributed.stop import Stop
from imaml_dist.training.run_directory import RunDirectory

HERE = "127.0.0.1"


class Keepers:
    """Trains a begun run; use as a context manager, which waits for the end."""

    def __init__(
        self,
        config: Any,
        path: Path,
        world: int,
        *,
        silence: float = 5.0,
        collective: float = 30.0,
        slow_to_tell: float = 0.0,
    ) -> None:
        self.run, self._slow_to_tell = RunDirectory(path), slow_to_tell
        self.failures: list[tuple[str, str]] = []
        self.results: list[Stop | BaseException | None] = [None] * world
        store, port = open_store(HERE)
        self._threads = []
        for rank in range(world):
            order = {
                "config": config.model_dump(by_alias=True),
                "run": str(path),
                "folder": str(path),
                "import_path": [os.getcwd(), str(Path(__file__).parents[1])],
                "host": HERE,
                "port": port,
                "rank": rank,
                "world": world,
                "timeout": collective,
                "backend": "gloo",
                "gpu": None,
            }
            crew = connect(HERE, port, rank, world, store if rank == 0 else None)
            arguments = (crew, order, Limits(silence, collective))
            self._threads.append(threading.Thread(target=self._keep, args=arguments))

    def _keep(self, crew: Crew, order: dict[str, Any], limits: Limits) -> None:
        try:
            keeper = Keeper(RankProcess(), crew, order, limits, self._failed)
            self.results[crew.rank] = keeper.run()
        except BaseException as error:
            self.results[crew.rank] = error

    def _failed(self, kind: str, message: str) -> None:
        time.sleep(self._slow_to_tell)
        self.failures.append((kind, message))

    def __enter__(self) -> "Keepers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads)

    def pids(self) -> list[int]:
        """Of the ranks of the newest group."""
        return self.run.starts()[-1]["pids"]

    def wait(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, (self.results, self.failures)
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until its metrics are written."""
        file = self.run.metrics_file
        self.wait(lambda: file.is_file() and file.read_bytes().count(b"\n") > step)
