"""What runs in a Ray Train worker: the keeper of one rank. It imports nothing that takes seconds before the rank's process is started,
so that both import torch at the same time."""

from __future__ import annotations

import os
from typing import Any

from imaml_dist.distributed.interface import interface_of
from imaml_dist.distributed.rank_process import RankProcess
from imaml_dist.distributed.stop import Outcome


def keep_rank(payload: dict[str, Any]) -> Outcome:
    """Keep this worker's rank to the end of the run.

    Args:
        payload: `config`, `run` (the address of its directory), `import_path` for a user's own modules, and `starts`, how often the
            run had been started before this command.

    Returns:
        The `Stop`, or type and message of the error that ended the run. Ray hands rank 0's to the command.

    Raises:
        PeerLostError: another keeper is lost. Ray starts all of them again.
        ImamlError: this one, not rank 0's, cannot keep its rank; rank 0's and the run directory have the error, too.
    """
    from ray.util import get_node_ip_address

    here = get_node_ip_address()
    if (interface := interface_of(here)) is not None:
        # Of their own accord gloo and nccl take the address that the machine's name stands for, which others may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    process = RankProcess()
    try:
        from imaml_dist.distributed.ray_keeper import keep

        return keep(payload, here, process)
    finally:
        process.kill()
