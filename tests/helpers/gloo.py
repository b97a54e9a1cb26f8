"""Real gloo groups of real processes on the loopback address."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _entry(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        results.put((rank, True, function(*args)))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def run_group(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call a module-level function in `world` processes that form a gloo group; returns their results by rank."""
    context = mp.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=_entry, args=(r, world, port, function, args, results)) for r in range(world)]
    for process in processes:
        process.start()
    try:
        found = {}
        for _ in processes:
            rank, ok, value = results.get(timeout=timeout)
            assert ok, f"rank {rank} failed:\n{value}"
            found[rank] = value
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]
