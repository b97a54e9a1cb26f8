"""The process of one rank: it trains when its keeper says so, and remembers the state when the others are lost.

    python -m imaml_dist.distributed.rank FD

FD is the process's end of its `Channel`. It is told `join` (train, in this group) and `save` (a checkpoint at the end of the
step), and says `ready`, `joined`, `beat` (twice a second, with its step and the chunk that it computes), and how a group ended for it:
`ended`, `lost`, `failed` (an error that is the run's), `crashed` (any other) or `faulty` (its state is not that of the others), which
are this process's end, too.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from imaml_dist.config.load import build_config
from imaml_dist.distributed import progress
from imaml_dist.distributed.build import storage_options
from imaml_dist.distributed.channel import Channel, Message
from imaml_dist.distributed.group import ProcessGroup, losses
from imaml_dist.distributed.memory import Memory
from imaml_dist.distributed.rank_process import COMING_S
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import DisagreementError, ImamlError, PeerLostError, brief
from imaml_dist.training.remote_run import open_run

BEAT_S = 0.5


class Rank:
    """What the keeper of a rank talks to."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: queue.Queue[Message] = queue.Queue()
        self._worker: Worker | None = None
        self._memory: Memory | None = None

    def live(self) -> None:
        """Do as one is told until the keeper is gone, which ends the process."""
        signal.signal(signal.SIGTERM, lambda number, frame: self._save())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which asks for an end by a file
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        self._channel.send(said="ready")
        while True:
            self._join(self._orders.get())

    def _listen(self) -> None:
        while self._channel.open:
            for message in self._channel.receive():
                if message["do"] == "join":
                    self._orders.put(message)
                elif message["do"] == "save":
                    self._save()
        os._exit(1)  # whatever the training is doing: nobody is interested in it any more

    def _beat(self) -> None:
        while True:
            worker = self._worker  # looked at once: the main thread takes it away at any time
            step = -1 if worker is None else worker.state.step
            self._channel.send(said="beat", step=step, chunk=progress.chunk())
            time.sleep(BEAT_S)

    def _save(self) -> None:
        worker = self._worker
        if worker is not None:
            worker.save_now = True

    def _join(self, order: Message) -> None:
        try:
            self._channel.send(said="ended", stop=int(self._trained(order)))
        except DisagreementError as error:
            if error.faulty:  # nothing that this process remembers can be trusted
                self._end("faulty", str(error))
            self._channel.send(said="lost", why=str(error))
        except PeerLostError:
            self._channel.send(said="lost", why="")
        except ImamlError as error:
            if type(error) is ImamlError:  # only says that rank 0 gave up, whose own reason must stand
                self._channel.send(said="lost", why=str(error))
            else:
                self._channel.send(said="failed", type=type(error).__name__, message=str(error))
        except Exception as error:
            traceback.print_exc()
            self._end("crashed", brief(error))

    def _end(self, said: str, why: str) -> NoReturn:
        self._channel.send(said=said, why=why)
        os._exit(1)

    def _trained(self, order: Message) -> int:
        """Join a group and train in it."""
        deadline = time.monotonic() + order["timeout"] + COMING_S
        sys.path[:0] = [path for path in order["import_path"] if path not in sys.path]
        if order["gpu"] is not None:
            torch.cuda.set_device(order["gpu"])
        limit = timedelta(seconds=order["timeout"])
        worker = None
        try:
            with losses():
                store = TCPStore(order["host"], order["port"], is_master=False, timeout=limit)
                _wait_for_all(store, order, deadline)
                # A group that could not be made leaves this count, which is a part of the next one's names in the store.
                dist.distributed_c10d._world.group_count = 0
                dist.init_process_group(
                    order["backend"],
                    store=PrefixStore(f"group/{order['generation']}", store),
                    rank=order["rank"],
                    world_size=order["world"],
                    timeout=limit,
                )
            self._channel.send(said="joined")
            config = build_config(order["config"])
            run = open_run(order["run"], storage_options(config), Path(order["folder"]))
            worker = self._worker = Worker(config, run, ProcessGroup(), self._memory, order["after"])
            return worker.run_to_end()
        finally:
            if worker is not None:
                self._memory = worker.memory()
            worker = self._worker = None  # the next one needs its memory
            with suppress(Exception):  # closes the connections, which tells the others
                dist.destroy_process_group()


def _wait_for_all(store: TCPStore, order: Message, deadline: float) -> None:
    """Make no group before all are here: making it cannot be broken off when one of them is lost.

    Raises:
        PeerLostError: this generation is over, or one does not come: all were told to at once.
    """
    here, over = f"{order['generation']}/here", f"{order['generation']}/over"
    store.set(f"{here}/{order['rank']}", "")
    while not store.check([f"{here}/{rank}" for rank in range(order["world"])]):
        if store.check([over]):
            raise PeerLostError("another worker is gone")
        if time.monotonic() > deadline:
            raise PeerLostError("another worker does not come")
        time.sleep(0.02 * max(1.0, order["world"] / 64))


if __name__ == "__main__":
    Rank(Channel(socket.socket(fileno=int(sys.argv[1])))).live()
