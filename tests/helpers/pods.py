"""The pods of a RayJob on pretend machines: Ray started in each as KubeRay would start it, by the manifest's own parameters."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.netns import Machines, machines
from helpers.ray_cluster import ROOT, clean_environment

from cluster.reproduce import RayStart, ray_starts

HEAD = 0
CLUSTER = "emulated"
UP_S = 90.0


class Pods:
    """Machine 0 has the head, the next ones the workers; then comes a node without a pod, and last the user's own machine.

    Args:
        made: the machines.
        job: the manifest.
        folder: for logs and caches.
    """

    def __init__(self, made: Machines, job: Mapping[str, Any], folder: Path) -> None:
        self.machines, self._folder = made, folder
        head, workers = ray_starts(job, made.addresses[HEAD], CLUSTER)
        assert workers.pods == len(made.addresses) - 3
        self._kinds: dict[int, RayStart] = {HEAD: head, **dict.fromkeys(range(1, workers.pods + 2), workers)}
        self.workers = list(range(1, workers.pods + 1))
        self.spare, self.user = workers.pods + 1, workers.pods + 2
        self.token = secrets.token_hex(32)
        self.dashboard = f"http://{made.addresses[HEAD]}:8265"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """The head and all workers, and wait until they are up."""
        for i in (HEAD, *self.workers):
            self.start_pod(i)

    def start_pod(self, i: int) -> None:
        """One of them. What a test adds to the manifest is the size of the object store and the address."""
        kind = self._kinds[i]
        assert kind.secrets["RAY_AUTH_TOKEN"] == f"{CLUSTER}/auth_token"
        own = {
            "RAY_AUTH_TOKEN": self.token,
            "IMAML_CACHE": str(self._folder / "cache"),
            "IMAML_KERNELS": os.environ["IMAML_KERNELS"],
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # as in the image
        }
        words = [w for w in kind.command[1:] if not w.startswith("--object-store-memory")]
        words += [f"--object-store-memory={80 << 20}", f"--node-ip-address={self.machines.addresses[i]}"]
        log = self._folder / f"ray-{len(self._started)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*self.machines.inside(i), sys.executable, "-m", "ray.scripts.scripts", *words],
                env={**clean_environment(), **kind.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._started.append(process)
        deadline = time.monotonic() + UP_S
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def replace(self, i: int) -> None:
        """Kill all processes of a worker's pod, as its node does, and start another pod elsewhere, as KubeRay does."""
        self.machines.kill(i)
        self.start_pod(self.spare)
        self.workers.remove(i)
        self.workers.append(self.spare)
        self.spare = i

    def lose_head(self) -> None:
        """Kill all processes of the head's pod, and make a new cluster, as KubeRay does where `backoffLimit` allows it."""
        self.machines.kill(HEAD)
        for i in self.workers:
            self.machines.kill(i)
        self.start()

    def reap(self) -> None:
        """Kill all pods, and wait for them."""
        for i in self._kinds:
            self.machines.kill(i)
        for process in self._started:
            process.wait(30)


@contextmanager
def pods(job: Mapping[str, Any], folder: Path) -> Iterator[Pods]:
    """Those of a RayJob with one group of workers, all up; nothing of them is left after the block."""
    replicas = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    with machines(replicas + 3, folder) as made:
        started = Pods(made, job, folder)
        try:
            started.start()
            yield started
        finally:
            started.reap()
