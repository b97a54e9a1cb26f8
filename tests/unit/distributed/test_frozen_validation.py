"""Validation on frozen tasks: the same tasks whatever the seed, and what does not fit is refused by name."""

import pytest
import torch
from helpers.runs import raw_config, tiny, train_alone

from imaml_dist.config.load import build_config
from imaml_dist.data.dataset import Dataset
from imaml_dist.data.frozen import freeze, publish
from imaml_dist.distributed.build import make_source, make_validation_source, resolve
from imaml_dist.errors import CheckpointError, ConfigError
from imaml_dist.tracking import metrics_file


@pytest.fixture
def manifest(data, tmp_path):
    """Twelve tasks of the validation split, drawn by seed 9, with five queries of each class."""
    path = str(tmp_path / "frozen.jsonl")
    publish(path, freeze(make_source(tiny(data, "data.query=5", seed=9), Dataset(str(data)), "val"), 12))
    return path


def tasks(config):
    source = make_validation_source(config, Dataset(config.data.url))
    return source.episodes(0, range(12)).query_x


def test_the_tasks_are_those_of_the_manifest_whatever_the_seed_and_the_queries(data, manifest):
    frozen = [tasks(tiny(data, f"validate.manifest={manifest}", seed=seed)) for seed in (0, 1)]
    drawn = [tasks(tiny(data, seed=seed)) for seed in (0, 1)]
    assert torch.equal(*frozen) and not torch.equal(*drawn)
    assert torch.equal(frozen[0], tasks(tiny(data, "data.query=5", seed=9)))
    assert make_validation_source(tiny(data, "validate.tasks=0"), Dataset(str(data))) is None


def test_a_run_validates_on_them_and_trains_as_ever(data, manifest, tmp_path):
    hard = ("model.channels=2", "algorithm.inner.steps=1", "algorithm.inner.lr=0.02")
    plain, frozen = tiny(data, *hard), tiny(data, *hard, f"validate.manifest={manifest}")
    ends = [train_alone(config, tmp_path / name) for name, config in (("plain", plain), ("frozen", frozen))]
    assert ends[0]["state"] == ends[1]["state"]
    found = [
        [
            r["val_accuracy"]
            for r in metrics_file.read(tmp_path / name / "metrics.jsonl")
            if r.get("val_accuracy") is not None
        ]
        for name in ("plain", "frozen")
    ]
    assert len(found[0]) == len(found[1]) == 2 and found[0] != found[1]


def test_what_does_not_fit_is_refused(data, manifest):
    dataset = Dataset(str(data))
    for override, says in (("data.way=4", "have 3 classes, data.way is 4"), ("validate.tasks=13", "has 12 tasks")):
        with pytest.raises(ConfigError, match=says):
            make_validation_source(tiny(data, f"validate.manifest={manifest}", override), dataset)


def test_a_run_that_goes_on_keeps_its_tasks(data, manifest, tmp_path):
    config = tiny(data, f"validate.manifest={manifest}", steps=3)
    train_alone(config, tmp_path / "run")
    other = str(tmp_path / "other.jsonl")
    publish(other, freeze(make_source(tiny(data, seed=5), Dataset(str(data)), "val"), 12))
    (tmp_path / "frozen.jsonl").unlink()
    (tmp_path / "other.jsonl").rename(tmp_path / "frozen.jsonl")
    with pytest.raises(CheckpointError, match="was begun with frozen tasks"):
        train_alone(tiny(data, f"validate.manifest={manifest}", steps=6), tmp_path / "run")


def test_several_workers_cannot_share_a_gpu(data):
    shared = ("run.device=cuda", "run.gpus_per_worker=0.5")
    with pytest.raises(ConfigError, match=r"run\.gpus_per_worker: 0\.5 given with 2 workers"):
        resolve(build_config(raw_config(data), shared), cuda=True)
    assert resolve(build_config(raw_config(data), (*shared, "run.workers=1")), cuda=True).run.gpus_per_worker == 0.5
