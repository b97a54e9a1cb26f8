"""Augmentation: every draw belongs to one image, operations do what they say, and what means nothing changes nothing."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.datasets import write_blobs
from helpers.runs import tiny

from imaml_dist.data.augment import WORDS, Augmentation, augmented, image_draws
from imaml_dist.data.dataset import Dataset
from imaml_dist.data.episodes import EpisodeSource
from imaml_dist.data.philox import Domain, Stream
from imaml_dist.distributed.build import make_source
from imaml_dist.errors import ConfigError

ALL = Augmentation(flip=True, vertical_flip=True, quarter_turns=True, crop=3, rotate=20.0, colour=0.3)
SHAPE = {"way": 3, "shot": 1, "query": 2, "seed": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return Dataset(str(folder))


def photos(count=6, height=12, width=12, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def draws(count, **words):
    """Draws that mean nothing, but for those given by their number: `w3=0.2`."""
    u = np.full((count, WORDS), 0.5)
    u[:, 2] = 0
    for name, value in words.items():
        u[:, int(name[1:])] = value
    return u


def test_draws_are_the_words_of_the_images_own_streams():
    u = image_draws(7, 3, 5, 4)
    for i in range(4):
        stream = Stream(7, Domain.AUGMENTATION, 3, 5, ordinal=i + 1)
        assert u[i].tolist() == [(stream.u64() >> 11) / 2**53 for _ in range(WORDS)]
    assert u[0, :3].tolist() == pytest.approx([0.08620112, 0.59197692, 0.58194071], abs=1e-6)


def test_what_means_nothing_gives_the_same_pixels():
    images = photos()
    assert np.array_equal(augmented(images, draws(6), ALL), images)
    assert augmented(images, image_draws(0, 0, 0, 6), Augmentation()) is images


def test_every_operation_does_what_it_says():
    images = photos()
    assert np.array_equal(augmented(images, draws(6, w0=0.49), ALL), images[:, :, ::-1])
    assert np.array_equal(augmented(images, draws(6, w1=0.0), ALL), images[:, ::-1])
    for k in range(4):
        turned = augmented(images, draws(6, w2=k / 4 + 0.2), ALL)
        assert np.array_equal(turned, np.rot90(images, k, axes=(1, 2)))
    down_left = augmented(images, draws(6, w3=0.999, w4=0.0), ALL)
    assert np.array_equal(down_left[:, 3:, :-3], images[:, :-3, 3:])
    assert not down_left[:, :3].any() and not down_left[:, :, -3:].any()
    quarter = augmented(images, draws(6, w5=1.0), Augmentation(rotate=90.0))
    assert np.array_equal(quarter, np.rot90(images, 1, axes=(1, 2))), "the two turn the same way"
    brighter = augmented(images, draws(6, w6=0.75), Augmentation(colour=0.4))
    assert np.abs(brighter - np.minimum(1.2 * images, 255)).max() <= 0.51
    flat = augmented(images, draws(6, w7=0.0), Augmentation(colour=1.0))
    assert np.abs(flat - images.mean((1, 2, 3), keepdims=True)).max() <= 0.51
    grey = augmented(images, draws(6, w8=0.0), Augmentation(colour=1.0))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 0] - images @ [0.299, 0.587, 0.114]).max() <= 0.51
    one_channel = images[..., :1]
    assert np.array_equal(augmented(one_channel, draws(6, w8=0.0), ALL), one_channel), (
        "saturation is for three channels"
    )


def test_a_rotation_keeps_what_is_in_the_middle_and_loses_the_corners():
    disc = (np.hypot(*np.mgrid[-13.5:14, -13.5:14]) < 9).astype(np.uint8)[None, :, :, None] * 200
    turned = augmented(disc, draws(1, w5=0.9), Augmentation(rotate=30.0))
    assert np.abs(turned.astype(int) - disc).mean() < 4
    corners = augmented(np.full_like(disc, 200), draws(1, w5=1.0), Augmentation(rotate=45.0))[0, :, :, 0]
    assert corners[0, 0] == 0 and corners[14, 14] == 200


def test_switching_one_operation_on_leaves_the_draws_of_the_others_alone():
    images, u = photos(40), image_draws(1, 2, 3, 40)
    for name in ("flip", "vertical_flip"):
        alone = augmented(images, u, Augmentation(**{name: True}))
        after = augmented(alone, u, Augmentation(crop=2))
        assert np.array_equal(augmented(images, u, Augmentation(crop=2, **{name: True})), after)


def test_a_task_does_not_depend_on_its_company_and_the_draw_not_on_augmentation(dataset):
    plain, changed = (EpisodeSource(dataset, "train", **SHAPE, augmentation=how) for how in (None, ALL))
    together = changed.episodes(3, range(6))
    changed.episodes(8, range(2))
    for task in (5, 0, 2):
        alone = changed.episodes(3, range(task, task + 1))
        assert torch.equal(alone.support_x[0], together.support_x[task])
        assert torch.equal(alone.query_x[0], together.query_x[task])
        assert changed.draw(3, task) == plain.draw(3, task)
    before = plain.episodes(3, range(6))
    assert not torch.equal(together.support_x, before.support_x) and not torch.equal(together.query_x, before.query_x)
    assert torch.equal(together.key, before.key)
    assert not torch.equal(changed.episodes(4, range(1)).query_x, together.query_x[:1])


def test_image_i_counts_by_class_support_first(dataset):
    how = Augmentation(flip=True, crop=2)
    source = EpisodeSource(dataset, "train", **SHAPE, augmentation=how)
    classes, numbers = source.draw(1, 4)
    images = np.concatenate(
        [dataset.images(dataset.classes("train")[c])[n] for c, n in zip(classes, numbers, strict=True)]
    )
    expected = torch.from_numpy(augmented(images, image_draws(5, 1, 4, 9), how).copy()).reshape(3, 3, 28, 28) / 255
    batch = source.episodes(1, range(4, 5))
    assert torch.equal(batch.support_x[0, :, 0], expected[:, 0])
    assert torch.equal(batch.query_x[0, :, 0], expected[:, 1:].reshape(6, 28, 28))


def test_flips_and_shifts_are_as_likely_as_they_should_be():
    u = np.concatenate([image_draws(2, 0, task, 10) for task in range(400)])
    assert abs((u[:, 0] < 0.5).mean() - 0.5) < 0.03
    marked = np.zeros((len(u), 9, 9, 1), dtype=np.uint8)
    marked[:, 4, 4] = 1
    _, y, x, _ = np.nonzero(augmented(marked, u, Augmentation(crop=2)))
    counts = np.bincount(5 * (y - 2) + x - 2, minlength=25)
    assert len(y) == len(u) and len(counts) == 25
    assert ((counts - 160) ** 2 / 160).sum() < 51.2  # 0.1 % of the chi-square distribution with 24 degrees of freedom


def test_what_the_images_cannot_undergo_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"data\.augment\.crop: 28 given, but the images are 28 x 28; choose 0 to 27"):
        EpisodeSource(dataset, "train", **SHAPE, augmentation=replace(ALL, crop=28))
    with pytest.raises(ConfigError, match=r"data\.augment\.quarter_turns: true given, but the images are 8 x 9"):
        ALL.check((1, 8, 9))
    replace(ALL, quarter_turns=False).check((1, 8, 9))
    narrow = augmented(photos(4, 8, 9), image_draws(0, 0, 0, 4), replace(ALL, quarter_turns=False))
    assert narrow.shape == (4, 8, 9, 3)


def test_a_configuration_changes_training_only(data):
    switches = ("data.augment.flip=true", "data.augment.crop=2", "data.pool=4")
    config, plain = tiny(data, *switches), tiny(data)
    dataset = Dataset(config.data.url)
    for split, training, same in (
        ("train", True, False),
        ("train", False, True),
        ("val", True, True),
        ("test", True, True),
    ):
        batch = make_source(config, dataset, split, training=training).episodes(2, range(4))
        expected = make_source(plain, dataset, split).episodes(2, range(4))
        assert torch.equal(batch.query_x, expected.query_x) == same, split
        assert torch.equal(batch.key, expected.key)


def test_it_is_cheap():
    images, how = photos(30, 28, 28, 1), Augmentation(flip=True, crop=3)
    seconds = []
    for task in range(20):
        began = time.perf_counter()
        augmented(images, image_draws(0, 0, task, 30), how)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 3e-3
