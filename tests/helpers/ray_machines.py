"""A Ray cluster on pretend machines: a head without CPUs, and workers with one each."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.netns import Machines, machines
from helpers.ray_cluster import ROOT, clean_environment, settings

HEAD = 0
PORT = 6379
UP_S = 60.0


class RayMachines:
    """`env` is what a command on the head, started `inside(HEAD)`, needs to reach Ray."""

    def __init__(self, made: Machines, env: dict[str, str], folder: Path) -> None:
        self.machines, self._settings, self._folder = made, env, folder
        self.env = {**env, "RAY_ADDRESS": f"{made.addresses[HEAD]}:{PORT}"}

    def start(self, i: int) -> None:
        """Start Ray on a machine, and wait until it is up."""
        log = self._folder / f"ray-{i}.log"
        head = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        role = head if i == HEAD else [f"--address={self.machines.addresses[HEAD]}:{PORT}", "--num-cpus=1"]
        own = [f"--node-ip-address={self.machines.addresses[i]}", f"--object-store-memory={80 << 20}", "--block"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*self.machines.inside(i), sys.executable, "-m", "ray.scripts.scripts", "start", *role, *own],
                env={**clean_environment(), "PYTHONPATH": str(ROOT), **self._settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + UP_S
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@contextmanager
def ray_machines(workers: int, folder: Path) -> Iterator[RayMachines]:
    """A head, which is machine 0, and so many workers; nothing is left of them after the block."""
    with machines(1 + workers, folder) as made:
        ray = RayMachines(made, settings(), folder)
        for i in range(1 + workers):
            ray.start(i)
        yield ray
