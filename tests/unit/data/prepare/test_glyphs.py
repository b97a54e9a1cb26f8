"""The embedded glyph data set: reproducible, readable, and with test alphabets that training never saw."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imaml_dist.data.prepare import glyphs
from imaml_dist.data.records import ClassRecord
from imaml_dist.errors import DataError, InputError

Splits = dict[str, list[ClassRecord]]

ROOT = Path(__file__).parents[4]
FEW = {"train": ("GEORGIAN",), "val": ("ARMENIAN",), "test": ("LAO",)}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return glyphs.glyph_splits()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "SCRIPTS", FEW)
    monkeypatch.setattr(glyphs, "TRAIN_BLOCKS", ())


def _digest(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            digest.update(repr((split, record.key, record.name, record.sources)).encode())
            digest.update(record.images.tobytes())
    return digest.hexdigest()


def _everything(splits: Splits) -> list[ClassRecord]:
    return [record for records in splits.values() for record in records]


def _scripts(records: list[ClassRecord]) -> set[str]:
    return {record.key.split("/")[0] for record in records}


def _means(records: list[ClassRecord]) -> NDArray[np.float64]:
    return np.stack([record.images.mean(axis=0).reshape(-1) for record in records])


def _distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances of rows over the smaller of their squared lengths."""
    a, b = (left**2).sum(axis=1)[:, None], (right**2).sum(axis=1)[None, :]
    distances: NDArray[np.float64] = (a + b - 2 * left @ right.T) / np.minimum(a, b)
    return distances


@pytest.mark.usefixtures("few")
def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    first = glyphs.glyph_splits(seed=3, images_per_class=4)
    other = glyphs.glyph_splits(seed=4, images_per_class=4)
    assert _digest(glyphs.glyph_splits(seed=3, images_per_class=4)) == _digest(first)
    assert _digest(other) != _digest(first)
    assert [record.key for record in _everything(other)] == [record.key for record in _everything(first)]


@pytest.mark.usefixtures("few")
def test_fewer_images_are_the_first_ones_of_more() -> None:
    more, fewer = glyphs.glyph_splits(images_per_class=25), glyphs.glyph_splits(images_per_class=2)
    for long, short in zip(_everything(more), _everything(fewer), strict=True):
        assert len(long.images) == 25
        assert np.array_equal(long.images[:2], short.images)
        assert long.sources[:2] == short.sources


@pytest.mark.usefixtures("few")
def test_progress_counts_every_class_once() -> None:
    calls: list[tuple[int, int]] = []
    splits = glyphs.glyph_splits(images_per_class=1, progress=lambda done, total: calls.append((done, total)))
    total = len(_everything(splits))
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_there_are_enough_classes(splits: Splits) -> None:
    assert list(splits) == ["train", "val", "test"]
    assert len(splits["train"]) >= 1000
    assert len(splits["val"]) >= 60
    assert len(splits["test"]) >= 150


def test_keys_are_valid_unique_and_in_order(splits: Splits) -> None:
    keys = [record.key for record in _everything(splits)]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Z][A-Za-z-]*/[0-9A-F]{5}", key) for key in keys)
    for records in splits.values():
        assert [record.key for record in records] == sorted(record.key for record in records)


def test_every_split_has_scripts_of_its_own(splits: Splits) -> None:
    train, val, test = (_scripts(records) for records in splits.values())
    assert len(train) + len(val) + len(test) == len(train | val | test)
    assert {"Latin", "Greek"} <= train
    assert val == {"Georgian"}
    assert test == {"Armenian", "Cyrillic", "Lao"}


def test_records_are_complete(splits: Splits) -> None:
    for record in _everything(splits):
        assert record.images.shape == (20, 28, 28, 1)
        assert record.images.dtype == np.uint8
        assert len(record.sources) == 20
        assert record.name


def test_every_image_has_ink_and_is_neither_full_nor_cut_off(splits: Splits) -> None:
    images = np.stack([record.images[..., 0] for record in _everything(splits)])
    covered = (images > 127).mean(axis=(2, 3))
    assert covered.min() > 0.01
    assert covered.max() < 0.65
    assert images.max(axis=(2, 3)).min() > 127
    border = np.concatenate([images[:, :, [0, -1], :], images[:, :, :, [0, -1]].swapaxes(2, 3)], axis=2)
    assert (border > 127).mean() < 1e-4


def test_images_of_a_class_are_all_different(splits: Splits) -> None:
    for record in _everything(splits):
        assert len({image.tobytes() for image in record.images}) == len(record.images)


def test_alphabets_are_drawn_by_several_fonts(splits: Splits) -> None:
    for record in splits["val"] + splits["test"]:
        assert len(set(record.sources)) >= 4, record.name


def test_no_look_alikes_across_splits(splits: Splits) -> None:
    train, val, test = (_means(records) for records in splits.values())
    for left, right in ((train, val), (train, test), (val, test)):
        assert _distances(left, right).min() > 0.08


def test_no_look_alikes_within_a_split(splits: Splits) -> None:
    for records in splits.values():
        means = _means(records)
        distances = _distances(means, means) + np.eye(len(means))
        assert distances.min() > 0.03


@pytest.mark.parametrize("letter", ["Greek/00391", "Cyrillic/00410", "Cyrillic/00430", "Armenian/00585"])
def test_letters_drawn_like_latin_ones_are_left_out(splits: Splits, letter: str) -> None:
    keys = {record.key for record in _everything(splits)}
    assert {"Latin/00041", "Latin/00061", "Latin/0006F"} <= keys
    assert letter not in keys


@pytest.mark.parametrize(
    "code_point",
    [
        pytest.param(0x0020, id="space"),
        pytest.param(0x00AD, id="soft hyphen"),
        pytest.param(0x0301, id="combining acute accent"),
        pytest.param(0x2028, id="line separator"),
        pytest.param(0x2500, id="box drawing"),
        pytest.param(0x2588, id="full block"),
        pytest.param(0x28FF, id="Braille"),
        pytest.param(0xE000, id="private use"),
        pytest.param(0x1D400, id="mathematical bold A"),
        pytest.param(0x02B0, id="modifier letter h"),
        pytest.param(0xFF21, id="full-width A"),
    ],
)
def test_code_points_that_take_no_part(code_point: int) -> None:
    assert glyphs._group(code_point) is None


@pytest.mark.parametrize(("seed", "images_per_class"), [(-1, 20), (2**64, 20), (0, 0)])
def test_arguments_out_of_range(seed: int, images_per_class: int) -> None:
    with pytest.raises(InputError, match="choose"):
        glyphs.glyph_splits(seed, images_per_class)


@pytest.mark.parametrize(("package", "named"), [("matplotlib", "fonts/ttf"), ("fontTools", "fontTools")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str, named: str) -> None:
    find: Callable[[str], ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(DataError, match=f"{named}.*pip install"):
        glyphs.glyph_splits()


def test_matplotlib_is_not_imported() -> None:
    code = (
        "import sys; import imaml_dist.data.prepare.glyphs as g; g.SCRIPTS = {'train': ('LAO',)};"
        "g.TRAIN_BLOCKS = (); assert g.glyph_splits(images_per_class=1)['train'];"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
