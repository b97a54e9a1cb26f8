"""How many episodes a second come out of memory, a folder, the node's cache and cold object storage, beside plain webdataset?

imaml prepare glyphs --out data/glyphs
python benchmarks/data.py --data data/glyphs --repeats 7 --json data.json

5-way 1-shot with 5 queries a class, 28x28 images as tensors, one thread. Object storage is a server on this machine, which
tests use too. "memory" is the same source over arrays that are never verified, "folder" the data set where it lies, "warm
cache" `s3://` with everything in the node's cache, "cold" `s3://` with an empty cache until 500 episodes are there.
Plain webdataset reads one sample an image, class after class, into a shuffle buffer of 64 classes, out of which the same kind
of episode is composed; in "webdataset" a class leaves the buffer when it was used once, in "webdataset, reuse" after four times
(a class has 20 images, an episode takes 6). All take turns, and ratios are medians of pairs from the same turn. In the end, two
workers train by the default algorithm from the warm cache, to see which part of a step goes into waiting for data.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import webdataset
from meta_gradient import facts
from scaling import configuration

from imaml_dist.data.dataset import CacheOptions, Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.distributed.group import ProcessGroup
from imaml_dist.distributed.worker import Worker
from imaml_dist.storage.options import StorageOptions
from imaml_dist.tracking import metrics_file
from imaml_dist.training.run_directory import RunDirectory

WAY, SHOT, QUERY, TASKS = 5, 1, 5, 16
COLD, SECONDS, BUFFER = 512, 1.0, 64

SERVER = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Memory(Dataset):
    """The data set as arrays, without any of what makes reading safe."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        read = Dataset(url)
        self._arrays = {(e.shard, e.offset, e.rot): read.images(e) for e in read.classes("train")}

    def gather(self, wanted: Any) -> Any:
        """See `Dataset`."""
        return [self._arrays[e.shard, e.offset, e.rot][list(numbers)] for e, numbers in wanted]


def source(dataset: Dataset) -> EpisodeSource:
    """Training episodes."""
    return EpisodeSource(dataset, "train", way=WAY, shot=SHOT, query=QUERY, seed=0)


def rate(make: Callable[[int], int]) -> float:
    """Episodes a second of a function that makes those of a step."""
    make(0)
    made, step, began = 0, 1, time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS:
        made += make(step)
        step += 1
    return made / spent


def ours(episodes: EpisodeSource) -> Callable[[int], int]:
    """A step of our source."""
    return lambda step: len(episodes.episodes(step, range(TASKS)))


def image_shards(dataset: Dataset, folder: Path) -> list[str]:
    """The training images as a webdataset user writes them: a sample an image, class after class."""
    names, classes = [], dataset.classes("train")
    for number in range(0, len(classes), 200):
        names.append(str(folder / f"{number // 200:06d}.tar"))
        with webdataset.TarWriter(names[-1]) as writer:
            for rank, entry in enumerate(classes[number : number + 200], start=number):
                for image, pixels in enumerate(dataset.images(entry)):
                    writer.write({"__key__": f"{rank:06d}/{image:03d}", "bin": pixels.tobytes()})
    return names


def plain_webdataset(shards: list[str], shape: tuple[int, int, int], uses: int) -> Iterator[int]:
    """Episodes out of a buffer of classes, whose classes are replaced when used up; yields once an episode."""
    channels, height, width = shape
    draw = random.Random(0)

    def classes() -> Iterator[list[bytes]]:
        known, images = None, []
        for sample in webdataset.WebDataset(shards, shardshuffle=len(shards)).repeat():
            key = sample["__key__"].split("/")[0]
            if known not in (None, key):
                yield images
                images = []
            known = key
            images.append(sample["bin"])

    coming = classes()
    buffer, left = [next(coming) for _ in range(BUFFER)], [uses] * BUFFER
    while True:
        pixels = []
        for place in draw.sample(range(BUFFER), WAY):
            chosen = draw.sample(buffer[place], SHOT + QUERY)
            pixels += [np.frombuffer(image, np.uint8).reshape(height, width, channels) for image in chosen]
            left[place] -= 1
            if left[place] == 0:
                buffer[place], left[place] = next(coming), uses
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255).contiguous()
        yield 1


@contextmanager
def object_storage(dataset: Dataset, folder: str) -> Iterator[StorageOptions]:
    """A server that holds the data set under `s3://bench/data`."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="bench")
        for path in Path(folder).iterdir():
            if path.is_file():
                client.upload_file(str(path), "bench", f"data/{path.name}")
        yield StorageOptions(endpoint=endpoint)
    finally:
        server.communicate("")


def cold(options: StorageOptions) -> float:
    """Episodes a second of the first ones, the opening of the data set included."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        dataset = Dataset("s3://bench/data", options, CacheOptions(Path(folder)))
        make = ours(source(dataset))
        made = sum(make(step) for step in range(COLD // TASKS))
        spent = time.perf_counter() - began
        dataset.close()
    return made / spent


def worker(rank: int, folder: Path, endpoint: str, cache: str) -> None:
    """One of two that train."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    config = configuration("s3://bench/data", steps=12, workers=2, reduction="exact", tasks=TASKS)
    storage = config.storage.model_copy(update={"endpoint": endpoint, "cache": cache})
    run = RunDirectory(folder / "run")
    if rank == 0:
        run.begin(config)
    dist.barrier()
    Worker(config.model_copy(update={"storage": storage}), run, ProcessGroup()).run_to_end()
    dist.barrier()
    dist.destroy_process_group()


def share_of_a_step(options: StorageOptions, cache: Path) -> dict[str, float]:
    """Milliseconds of a training step, and of those the ones spent waiting for episodes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (Path(folder), options.endpoint, str(cache)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        records = metrics_file.read(RunDirectory(Path(folder) / "run").metrics_file)[1:]
    step, data = (statistics.median(1e3 * r[key] for r in records) for key in ("seconds_step", "seconds_data"))
    return {"ms_step": step, "ms_data": data, "share": data / step}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/glyphs", help="a prepared data set in a folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    local = Dataset(options.data)
    with tempfile.TemporaryDirectory() as scratch, object_storage(local, options.data) as server:
        cache, images = Path(scratch) / "cache", Path(scratch) / "images"
        images.mkdir()
        remote = Dataset("s3://bench/data", server, CacheOptions(cache))
        remote.fetch(remote.classes("train"))
        shards = image_shards(local, images)
        plain = {uses: plain_webdataset(shards, local.index.image_shape, uses) for uses in (1, 4)}
        methods: dict[str, Callable[[], float]] = {
            "memory": lambda: rate(ours(source(memory))),
            "folder": lambda: rate(ours(source(local))),
            "warm cache": lambda: rate(ours(source(remote))),
            "cold": lambda: cold(server),
            "webdataset": lambda: rate(lambda _: next(plain[1])),
            "webdataset, reuse": lambda: rate(lambda _: next(plain[4])),
        }
        memory = Memory(options.data)
        turns = []
        for _ in range(options.repeats):
            turns.append({name: measure() for name, measure in methods.items()})
            print(".", end="", flush=True)
        remote.close()
        training = share_of_a_step(server, cache)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "episodes_per_second": statistics.median(turn[name] for turn in turns),
            "spread": [min(turn[name] for turn in turns), max(turn[name] for turn in turns)],
            "to_webdataset": statistics.median(turn[name] / turn["webdataset"] for turn in turns),
        }
        for name in methods
    }
    print(f"\n{'':20} {'episodes/s':>10} {'(spread)':>16} {'to webdataset':>14}")
    for name, row in rows.items():
        spread = "({:.0f}..{:.0f})".format(*row["spread"])
        print(f"{name:20} {row['episodes_per_second']:10.0f} {spread:>16} {row['to_webdataset']:13.2f}x")
    print(
        f"\ntwo workers: {training['ms_data']:.2f} of {training['ms_step']:.0f} ms of a step are spent waiting for data: "
        f"{training['share']:.2%}"
    )
    if options.json:
        report = {**facts(), "repeats": options.repeats, "rows": rows, "training": training}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
