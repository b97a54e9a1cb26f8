"""What runs in a Ray Train worker: the keeper of one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import storage_options
from imaml_dist.distributed.crew import connect, open_store
from imaml_dist.distributed.interface import interface_of
from imaml_dist.distributed.keeper import Keeper, Limits
from imaml_dist.distributed.rank_process import RankProcess
from imaml_dist.distributed.stop import Stop
from imaml_dist.errors import ImamlError, PeerLostError, StorageError
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory


def keep_rank(payload: dict[str, Any]) -> int:
    """Keep this worker's rank to the end of the run.

    Args:
        payload: `config`, `run` (the address of its directory), `import_path` for a user's own modules, and `starts`, how often the
            run had been started before this command.

    Returns:
        The `Stop`; INTERRUPTED if the run failed, whose error lies in the run directory then.

    Raises:
        PeerLostError: another keeper is lost. Ray starts all of them again.
        ImamlError: this one cannot keep its rank; the run directory has the error, too.
    """
    config = build_config(payload["config"])
    run = open_run(payload["run"], storage_options(config))
    run.collect()

    def failed(kind: str, message: str) -> None:
        try:
            run.fail(kind, message)
        except (OSError, StorageError) as error:  # a full disk may be the very failure
            print(f"{kind}: {message} (which cannot be written: {error})", file=sys.stderr, flush=True)

    if run.failure() is not None:  # Ray restarts the group after any error; one that will only repeat itself ends here
        return int(Stop.INTERRUPTED)
    try:
        stop = _keep(payload, config, run, failed)
    except PeerLostError:
        raise
    except ImamlError as error:
        failed(type(error).__name__, str(error))
        raise
    return int(Stop.INTERRUPTED if stop is None else stop)


def _keep(
    payload: dict[str, Any], config: ExperimentConfig, run: RunDirectory, failed: Callable[[str, str], None]
) -> Stop | None:
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device
    from ray.util import get_node_ip_address

    context, here = train.get_context(), get_node_ip_address()
    rank, world = context.get_world_rank(), context.get_world_size()
    if (interface := interface_of(here)) is not None:
        # Of their own accord they take the address that the machine's name stands for, which others may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    process = RankProcess()
    opened = open_store(here) if rank == 0 else None
    host, port = broadcast_from_rank_zero(None if opened is None else [here, opened[1]])
    cuda = config.run.device == "cuda"
    order = {
        **payload,
        "folder": str(run.path),
        "host": host,
        "port": port,
        "rank": rank,
        "world": world,
        "timeout": config.run.collective_timeout,
        "backend": "cpu:gloo,cuda:nccl" if cuda else "gloo",
        "gpu": get_device().index if cuda else None,
    }
    limits = Limits(config.run.heartbeat_timeout, config.run.collective_timeout)
    crew = connect(host, port, rank, world, None if opened is None else opened[0])
    again = "a node or a keeper was lost" if len(run.starts()) > payload["starts"] else None
    return Keeper(process, crew, order, limits, failed, _preempted, before=again).run()


def _preempted() -> bool:
    """Whether Ray knows that a worker's node is about to be taken away.

    `ray.train.get_preemption_info` would tell, but makes all workers wait for each other.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
