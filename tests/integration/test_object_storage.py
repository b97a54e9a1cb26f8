"""Training from real object storage gives the bits of training from a folder, whatever storage, cache and workers do."""

import hashlib
import json
from pathlib import Path

import pytest
from helpers.datasets import shard, write_blobs
from helpers.fault_proxy import Fault, FaultProxy
from helpers.gloo import run_group
from helpers.runs import fingerprint, raw_config, tiny, train_alone, train_in_a_group

from imaml_dist.data.dataset import CacheOptions, Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.data.index import FILE_NAME
from imaml_dist.errors import CheckpointError, ConfigError, DataError
from imaml_dist.storage.opening import open_storage
from imaml_dist.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven shards, so that there is something to ask for."""
    path = tmp_path_factory.mktemp("blobs")
    write_blobs(path, shard_bytes=60_000)
    return path


@pytest.fixture(scope="module")
def gold(folder, tmp_path_factory):
    return train_alone(tiny(folder), tmp_path_factory.mktemp("gold") / "run")


def upload(folder: Path, url: str, options) -> None:
    storage = open_storage(url, options)
    for path in sorted(folder.iterdir()):
        storage.write(path.name, path)


def settings(endpoint: str, cache: Path, **more) -> list[str]:
    """Overrides of the storage section."""
    chosen = {"endpoint": endpoint, "cache": str(cache), "read_timeout": 1.0, "retry_seconds": 20.0, **more}
    return [f"storage.{name}={value}" for name, value in chosen.items()]


def remote(url: str, endpoint: str, cache: Path, *overrides: str, **more):
    return tiny(url, *settings(endpoint, cache, **more), *overrides)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_s3_gives_the_bits_of_a_folder(bucket, folder, gold, tmp_path):
    url, options = bucket
    upload(folder, url + "/a/prefix", options)
    config = remote(url + "/a/prefix", options.endpoint, tmp_path / "cache")
    assert train_alone(config, tmp_path / "run") == gold
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["s3_bytes"] for record in metrics) > 0
    assert sum(record["cache_misses"] for record in metrics) > 0


@pytest.mark.parametrize("kind", ["cut", "reset", "stall", "503", "flip"])
def test_and_so_does_one_that_fails_again_and_again(moto_bucket, folder, gold, tmp_path, kind):
    url, options = moto_bucket
    upload(folder, url, options)
    with FaultProxy(options.endpoint, Fault(kind, every=5, after=20_000), Fault("503", every=3)) as proxy:
        config = remote(url, proxy.url, tmp_path / "cache")
        assert train_alone(config, tmp_path / "run") == gold
        assert proxy.counts[kind] >= 1
        assert proxy.sent["GET"] <= 1.2 * size_of(folder) + (70_000 * proxy.counts["flip"])


def test_two_workers_share_a_cache_and_fetch_once(moto_bucket, folder, gold, tmp_path):
    url, options = moto_bucket
    upload(folder, url, options)
    with FaultProxy(options.endpoint) as proxy:
        raw = raw_config(url, workers=2)
        raw["storage"] = {"endpoint": proxy.url, "cache": str(tmp_path / "cache")}
        RunDirectory(tmp_path / "run").begin(tiny(url, workers=2))
        run_group(2, train_in_a_group, raw, str(tmp_path / "run"))
        assert fingerprint(tmp_path / "run") == gold
        indices = 2 * (folder / FILE_NAME).stat().st_size
        assert proxy.sent["GET"] <= indices + size_of(folder)


def test_a_restart_with_a_cold_cache_another_budget_and_fewer_workers_changes_nothing(
    moto_bucket, folder, gold, tmp_path
):
    url, options = moto_bucket
    upload(folder, url, options)
    raw = raw_config(url, workers=2, steps=4)
    raw["storage"] = {"endpoint": options.endpoint, "cache": str(tmp_path / "warm")}
    raw["evaluate"]["tasks"] = 0
    RunDirectory(tmp_path / "run").begin(tiny(url, workers=2, steps=4))
    run_group(2, train_in_a_group, raw, str(tmp_path / "run"))
    config = remote(url, options.endpoint, tmp_path / "cold", cache_bytes=70_000, prefetch=0)
    assert train_alone(config, tmp_path / "run") == gold


def first_tasks(dataset: Dataset, tasks: int) -> str:
    source = EpisodeSource(dataset, "train", way=5, shot=1, query=2, seed=3)
    digest = hashlib.sha256()
    for step in range(tasks // 20):
        batch = source.episodes(step, range(20))
        digest.update(batch.support_x.numpy().tobytes() + batch.query_x.numpy().tobytes())
    return digest.hexdigest()


def test_the_first_10_000_tasks_are_the_same_from_everywhere(moto_bucket, folder, tmp_path):
    url, options = moto_bucket
    upload(folder, url, options)
    gold = first_tasks(Dataset(str(folder)), 10_000)
    warm = Dataset(url, options, CacheOptions(tmp_path / "cache"))
    assert [first_tasks(warm, 10_000) for _ in range(2)] == [gold, gold]
    warm.close()
    small = Dataset(url, options, CacheOptions(tmp_path / "small", 150_000))
    assert first_tasks(small, 1_000) == first_tasks(Dataset(str(folder)), 1_000)
    small.close()
    assert size_of_cache(tmp_path / "small") <= 150_000


def size_of_cache(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("blocks/??/*"))


def test_a_shard_replaced_in_mid_read_is_refused_by_name(moto_bucket, folder, tmp_path):
    url, options = moto_bucket
    upload(folder, url, options)
    path = shard(folder, "train")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    replace = Fault(
        "call", every=3, times=1, action=lambda: open_storage(url, options).write(path.name, bytes(content))
    )
    with FaultProxy(options.endpoint, replace) as proxy:
        config = remote(url, proxy.url, tmp_path / "cache", prefetch=0, cache_bytes=0)
        with pytest.raises(DataError, match=path.name + r": bytes \d+ to \d+, the images of class"):
            train_alone(config, tmp_path / "run")


def test_a_resumed_run_refuses_another_data_set(folder, tmp_path):
    config = tiny(folder, "evaluate.tasks=0", steps=2)
    train_alone_without_test(config, tmp_path / "run")
    other = tmp_path / "other"
    write_blobs(other)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data\.url"):
        run.begin(tiny(other, "evaluate.tasks=0", steps=4))
    moved = tmp_path / "moved"
    folder_of_run = Path(config.data.url)
    moved.symlink_to(folder_of_run)
    begun = tiny(moved, "evaluate.tasks=0", steps=2)
    train_alone_without_test(begun, tmp_path / "second")
    moved.unlink()
    moved.symlink_to(other)
    with pytest.raises(CheckpointError, match="begun with dataset"):
        train_alone_without_test(tiny(moved, "evaluate.tasks=0", steps=4), tmp_path / "second")


def train_alone_without_test(config, path):
    from imaml_dist.distributed.group import Alone
    from imaml_dist.distributed.worker import Worker

    run = RunDirectory(path)
    run.begin(config)
    Worker(config, run, Alone()).run_to_end()
