"""A keeper among those that Ray Train has started: meets the others, and keeps its rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from imaml_dist.config.load import build_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import storage_options
from imaml_dist.distributed.crew import connect, open_store
from imaml_dist.distributed.keeper import Keeper, Limits
from imaml_dist.distributed.rank_process import RankProcess
from imaml_dist.distributed.stop import Outcome, Stop
from imaml_dist.errors import ImamlError, PeerLostError
from imaml_dist.training.remote_run import open_run
from imaml_dist.training.run_directory import RunDirectory


def keep(payload: dict[str, Any], here: str, process: RankProcess) -> Outcome:
    """Keep this worker's rank to the end of the run.

    Only rank 0's keeper looks into the run directory before all have met; the others need not see it.

    Args:
        payload: see `keep_rank`.
        here: address of this node.
        process: a first one of the rank, which may not be up yet.

    Returns, Raises: as `keep_rank`.
    """
    from ray import train

    config = build_config(payload["config"])
    run = open_run(payload["run"], storage_options(config))
    first = train.get_context().get_world_rank() == 0

    def failed(kind: str, message: str) -> None:
        try:
            run.fail(kind, message)
        except (OSError, ImamlError) as error:  # a full disk may be the very failure
            print(f"{kind}: {message} (which cannot be written: {error})", file=sys.stderr, flush=True)

    try:
        return _keep(payload, config, run, here, process, failed)
    except PeerLostError:
        raise
    except ImamlError as error:
        failed(type(error).__name__, str(error))
        if first:
            return [type(error).__name__, str(error)]
        raise


def _keep(
    payload: dict[str, Any],
    config: ExperimentConfig,
    run: RunDirectory,
    here: str,
    process: RankProcess,
    failed: Callable[[str, str], None],
) -> Outcome:
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    first = rank == 0
    try:
        before = _told_before(run) if first else None
    except ImamlError:
        broadcast_from_rank_zero(None)  # nobody is to wait for this one
        raise
    opened = open_store(here) if first and before is None else None
    address = broadcast_from_rank_zero(None if opened is None else [here, opened[1]])
    if address is None:
        return before or int(Stop.INTERRUPTED)
    host, port = address
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
        "gpu": _gpu() if cuda else None,
    }
    limits = Limits(config.run.heartbeat_timeout, config.run.collective_timeout)
    crew = connect(host, port, rank, world, None if opened is None else opened[0])
    again = "a node or a keeper was lost" if first and len(run.starts()) > payload["starts"] else None
    stop = Keeper(process, crew, order, limits, failed, _preempted, before=again).run()
    return (crew.failure() if first else None) or int(Stop.INTERRUPTED) if stop is None else int(stop)


def _gpu() -> int | None:
    from ray.train.torch import get_device

    index: int | None = get_device().index
    return index


def _told_before(run: RunDirectory) -> list[str] | None:
    """The error of a group of keepers before this one: Ray starts them again after any, and this one would only repeat itself."""
    run.collect()
    told = run.failure()
    return None if told is None else [str(told["type"]), str(told["message"])]


def _preempted() -> bool:
    """Whether Ray knows that a worker's node is about to be taken away.

    `ray.train.get_preemption_info` would tell, but makes all workers wait for each other.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
