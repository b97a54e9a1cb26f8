"""How the keepers of a run's ranks agree: on who is there, that a group has come to its end, and why.

A group that loses a member is over for all; the next one is a new *generation*. Keepers do not talk to each other but to
one store, which lives with rank 0's keeper.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from imaml_dist.distributed.group import losses
from imaml_dist.errors import PeerLostError


def open_store(host: str) -> tuple[TCPStore, int]:
    """The store, served by this process on one address and no other, and its port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    port = int(listener.getsockname()[1])
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def connect(host: str, port: int, rank: int, world: int, own: TCPStore | None = None) -> Crew:
    """The crew of a store elsewhere, or of one's own.

    Raises:
        PeerLostError: the store does not answer.
    """
    with losses():
        return Crew(TCPStore(host, port, is_master=False) if own is None else own, rank, world)


@dataclass
class Crew:
    """The keepers, as seen by one of them.

    Args:
        store: shared by all.
        rank, world: of the rank that is kept.
    """

    store: Store
    rank: int
    world: int

    def gather(self, generation: int, mine: Any, timeout: float) -> list[Any]:
        """Wait until all keepers are ready for a generation; what each of them has to say about it, in JSON.

        Raises:
            PeerLostError: some keeper does not come in time.
        """
        keys = self._of_all(f"{generation}/ready")
        with losses():
            self.store.set(keys[self.rank], json.dumps(mine))
            try:
                self.store.wait(keys, timedelta(seconds=timeout))
            except RuntimeError as error:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                raise PeerLostError(f"ranks {missing} did not come back within {timeout:g} s") from error
            return [json.loads(self.store.get(key)) for key in keys]

    def end(self, generation: int, failed: bool = False) -> None:
        """Declare a generation over; if the run has failed, for good. What was declared first stands."""
        with losses():
            self.store.compare_set(f"{generation}/over", "", "failed" if failed else "lost")

    def over(self, generation: int) -> str | None:
        """`lost`, `failed`, or None while the generation lives."""
        key = f"{generation}/over"
        with losses():
            return self.store.get(key).decode() if self.store.check([key]) else None

    def finished(self, generation: int) -> None:
        """This rank has come to the end of the run."""
        with losses():
            self.store.set(f"{generation}/finished/{self.rank}", "")

    def all_finished(self, generation: int) -> bool:
        """Whether all ranks have."""
        with losses():
            return bool(self.store.check(self._of_all(f"{generation}/finished")))

    def tell_failure(self, kind: str, message: str) -> None:
        """Type and message of the error that ends the run; the first that is told stands."""
        with losses():
            self.store.compare_set("failure", "", json.dumps([kind, message]))

    def failure(self) -> list[str] | None:
        """What was told."""
        with losses():
            return json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None

    def leave(self, timeout: float) -> None:
        """Say that one will ask for nothing more; the store's owner waits until all have said so, but not for ever."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.store.wait(self._of_all("left"), timedelta(seconds=timeout))

    def _of_all(self, what: str) -> list[str]:
        return [f"{what}/{rank}" for rank in range(self.world)]
