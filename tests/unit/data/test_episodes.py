"""Episodes: the right images with the right labels, the same whoever asks and in whatever order."""

import hashlib

import numpy as np
import pytest
import torch

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.data.records import ClassRecord
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import ConfigError, DataError


def source(dataset, **changes):
    return EpisodeSource(dataset, **{"split": "train", "way": 5, "shot": 2, "query": 3, "seed": 1, **changes})


def test_pixels_and_labels_are_those_of_the_draw(dataset):
    s = source(dataset)
    batch = s.episodes(4, range(2, 5))
    assert batch.index.tolist() == [2, 3, 4]
    assert batch.support_x.shape == (3, 10, 1, 28, 28)
    assert batch.query_x.shape == (3, 15, 1, 28, 28)
    for row, task in enumerate(range(2, 5)):
        classes, numbers = s.draw(4, task)
        for label, (c, images) in enumerate(zip(classes, numbers, strict=True)):
            pixels = dataset.images(dataset.classes("train")[c]).transpose(0, 3, 1, 2) / np.float32(255)
            expected = torch.from_numpy(pixels)
            support = batch.support_x[row][batch.support_y[row] == label]
            query = batch.query_x[row][batch.query_y[row] == label]
            torch.testing.assert_close(support, expected[images[:2]], rtol=0, atol=0)
            torch.testing.assert_close(query, expected[images[2:]], rtol=0, atol=0)
            assert not set(images[:2]) & set(images[2:])


def test_a_task_does_not_depend_on_its_company_or_history(dataset):
    s = source(dataset)
    together = s.episodes(3, range(8))
    s.episodes(9, range(4))
    for task in (7, 0, 3):
        alone = s.episodes(3, range(task, task + 1))
        torch.testing.assert_close(alone.support_x[0], together.support_x[task], rtol=0, atol=0)
        torch.testing.assert_close(alone.query_x[0], together.query_x[task], rtol=0, atol=0)


def test_steps_tasks_seeds_and_splits_differ(dataset):
    draws = [source(dataset).draw(0, 0), source(dataset).draw(0, 1), source(dataset).draw(1, 0)]
    draws += [source(dataset, seed=2).draw(0, 0), source(dataset, split="val").draw(0, 0)]
    assert len({str(d) for d in draws}) == len(draws)
    sources = [source(dataset), source(dataset, seed=2), source(dataset, split="val")]
    keys = [key for s in sources for step in (0, 1) for key in s.episodes(step, range(3)).key.tolist()]
    assert len(set(keys)) == len(keys) == 18, "no two tasks drop alike"
    assert source(dataset).episodes(1, range(2, 3)).key.tolist() == keys[5:6], "and a task always does"


def test_the_images_of_a_batch_are_asked_for_at_once(dataset, monkeypatch):
    s, asked, gather = source(dataset), [], dataset.gather
    monkeypatch.setattr(
        dataset, "gather", lambda wanted: (asked.append([entry for entry, _ in wanted]), gather(wanted))[1]
    )
    s.episodes(6, range(1, 4))
    (entries,) = asked
    assert len(entries) == 3 * 5


def test_golden_episode_of_a_data_set(dataset):
    """Pixels and keys, from before episodes were composed in one piece."""
    batch = source(dataset).episodes(4, range(2, 5))
    pixels = (torch.cat([batch.support_x, batch.query_x], 1) * 255).round().to(torch.uint8)
    digest = hashlib.sha256(pixels.numpy().tobytes() + batch.key.numpy().tobytes()).hexdigest()
    assert digest.startswith("a0427d56adc3d1b8")


def test_colours_and_sides_are_where_they_should_be(tmp_path):
    images = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
    write_dataset(
        tmp_path, "rgb", {"train": [ClassRecord(f"c{i}", images[::-1] if i else images) for i in range(2)]}, {}
    )
    s = EpisodeSource(Dataset(str(tmp_path)), "train", way=2, shot=1, query=2, seed=0, dtype=torch.float64)
    batch = s.episodes(0, range(3))
    assert batch.support_x.shape == (3, 2, 3, 4, 5) and batch.query_x.shape == (3, 4, 3, 4, 5)
    assert batch.support_x.is_contiguous() and batch.query_x.is_contiguous() and batch.support_x.dtype == torch.float64
    for row in range(3):
        classes, numbers = s.draw(0, row)
        for label, (c, n) in enumerate(zip(classes, numbers, strict=True)):
            expected = torch.from_numpy((images[::-1] if c else images)[n].transpose(0, 3, 1, 2) / 255)
            assert torch.equal(batch.support_x[row, label], expected[0])
            assert torch.equal(batch.query_x[row, 2 * label : 2 * label + 2], expected[1:])


def test_impossible_episodes_are_refused_in_one_sentence(dataset):
    with pytest.raises(ConfigError, match=r"data\.way: 9 classes per episode.*val split.*has 8; choose 2 to 8"):
        source(dataset, split="val", way=9)
    with pytest.raises(ConfigError, match=r"data\.shot \+ query: 10 \+ 11 images per class.*has 20"):
        source(dataset, shot=10, query=11)
    with pytest.raises(DataError, match="no split 'dev'"):
        source(dataset, split="dev")
