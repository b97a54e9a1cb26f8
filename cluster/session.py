"""Connecting to a Ray cluster: the one that `RAY_ADDRESS` names, or a private one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from imaml_dist.errors import ClusterError

OBJECT_STORE_BYTES = 128 << 20
"""Of a private cluster. Tensors travel between workers directly, not through Ray's object store."""


@contextmanager
def ray_session(cpus: int) -> Iterator[None]:
    """Connect for the length of a `with` block.

    A private cluster binds to the loopback address, has no dashboard, asks for a token that lives in this process and
    its children only, and ends with the block.

    Args:
        cpus: that the caller will ask for; a private cluster claims to have them.

    Raises:
        ClusterError: the cluster cannot be started or reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray replaces a loopback address by the machine's own unless it believes that it cannot have several nodes.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    own: dict[str, object] = {
        # More workers than cores is the user's choice on a machine of their own; Ray would wait for ever.
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            address=address or "local",  # without one Ray takes any cluster that was started on this machine
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **({} if address else own),
        )
    except Exception as error:  # Ray raises whatever its parts raise
        where = (
            f"the Ray cluster at {address} cannot be reached" if address else "a local Ray cluster cannot be started"
        )
        raise ClusterError(
            f"{where} ({type(error).__name__}: {error}); check RAY_ADDRESS, or use --backend local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
