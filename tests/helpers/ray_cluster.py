"""A Ray cluster of several nodes on one machine, in a process of its own so that tests need no Ray themselves.

Each word on its standard input is an order: `add` or `lose` (a node with one CPU), or `where`; each is answered with a line.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class RayCluster:
    """`env` is what a command needs to reach it; `pid` is of the process that all of its processes descend from."""

    def __init__(self, process: subprocess.Popen, env: dict[str, str]) -> None:
        self._process, self.env, self.pid = process, env, process.pid

    def order(self, word: str) -> str:
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    @property
    def folder(self) -> Path:
        """Of a cluster with a dashboard: where all of its nodes have their logs and what jobs bring."""
        return Path(self.order("where"))


def settings() -> dict[str, str]:
    """The environment of all nodes and clients of a new cluster: a token of its own, and a lost node is noticed sooner than after a
    minute."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }


def clean_environment() -> dict[str, str]:
    """This process's, without anything of a cluster."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


@contextmanager
def ray_cluster(nodes: int, dashboard: int | None = None, **faults: str) -> Iterator[RayCluster]:
    """A head without CPUs and so many nodes with one each; all of it is gone after the block.

    Args:
        dashboard: port of one, which makes all of the cluster keep to the loopback address; None for none.
        faults: more environment of the nodes, and of no client.
    """
    env = settings()
    if (
        dashboard is not None
    ):  # Ray replaces a loopback address by the machine's own unless it believes that it cannot have several
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    process = subprocess.Popen(
        [sys.executable, __file__, *([] if dashboard is None else [str(dashboard)])],
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **env, **faults},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cluster = RayCluster(process, env)
        env["RAY_ADDRESS"] = cluster.order("address")
        for _ in range(nodes):
            cluster.order("add")
        yield cluster
    finally:
        process.stdin.close()
        process.wait(60)


def _serve() -> None:
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    own = {"object_store_memory": 80 << 20}
    head = {"num_cpus": 0, "include_dashboard": False}
    if len(sys.argv) > 1:
        # A job looks for its cluster's address in this folder, and in the one that is usual for the youngest cluster of the machine.
        place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for sockets are in it
        own |= {"node_ip_address": "127.0.0.1", "temp_dir": place}
        # The head's agent would otherwise want the one port that the agent of every other cluster's head has.
        head |= {"include_dashboard": True, "dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": None}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **own})
    if len(sys.argv) > 1:
        write_ray_address(cluster.gcs_address, place)
    nodes = []
    for line in sys.stdin:
        answer = cluster.address
        match line.strip():
            case "where":
                answer = place
            case "add":
                # Each unpacks a job's folder in a place of its own: in one place they would replace it under each other.
                nodes.append(cluster.add_node(num_cpus=1, runtime_env_dir_name=f"resources_{len(nodes)}", **own))
                cluster.wait_for_nodes()
            case "lose":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
        print(answer, flush=True)
    cluster.shutdown()
    if len(sys.argv) > 1:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    _serve()
