"""Dropout masks: the published generator, the right rate, and nothing but the key decides."""

import torch
from torch.func import vmap

from imaml_dist.models import masks


def test_bits_are_those_of_splitmix64():
    """The first outputs of the published generator for seed 1234567."""
    published = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    numbers = torch.arange(1, 6)
    found = masks._mixed(torch.tensor(1234567) + numbers * masks._GOLDEN)
    assert [int(v) % (1 << 64) for v in found] == list(published)


def test_a_mask_depends_on_its_key_and_not_on_the_others_in_the_batch():
    keys = torch.tensor([3, 4, 1 << 62, -5])
    together = vmap(lambda key: masks.keep_mask(key, (7, 11), 0.4))(keys)
    for key, mask in zip(keys, together, strict=True):
        assert torch.equal(mask, masks.keep_mask(key, (7, 11), 0.4))
    assert len({tuple(mask.flatten().tolist()) for mask in together}) == 4
    first, second = (masks.derived_key(keys, number) for number in (0, 1))
    assert len(set(first.tolist()) | set(second.tolist()) | set(keys.tolist())) == 12


def test_so_many_entries_are_dropped_as_asked_for_and_neighbours_are_independent():
    n = 200_000
    for p in (0.0, 0.1, 0.5, 0.93, 1.0):
        kept = masks.keep_mask(torch.tensor(12), (n,), p).double()
        deviation = 5 * (p * (1 - p) / n) ** 0.5
        assert abs(float(kept.mean()) - (1 - p)) <= deviation
    kept = masks.keep_mask(torch.tensor(99), (n,), 0.5).double() - 0.5
    for lag in (1, 2, 64):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 5 * 0.25 / n**0.5
    other = masks.keep_mask(torch.tensor(100), (n,), 0.5).double() - 0.5
    assert abs(float((kept * other).mean())) < 5 * 0.25 / n**0.5
