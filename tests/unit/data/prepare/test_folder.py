"""Folders of images: which classes they hold, how these are split, and what is refused."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
from helpers.datasets import Breaking
from PIL import Image

from imaml_dist.data.dataset import Dataset
from imaml_dist.data.prepare import decode
from imaml_dist.data.prepare.decode import Form
from imaml_dist.data.prepare.folder import folder_splits
from imaml_dist.data.shards import write_dataset
from imaml_dist.errors import DataError, StorageError
from imaml_dist.storage.folder import Folder

FORM = Form(4)
SIX = ("0.png", "1.png", "c/0.png", "c/1.png", "more/b/0.png", "more/b/1.png")


def draw(folder, images=2, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(images):
        shade = sum(folder.name.encode()) * 7 + n
        Image.fromarray(np.full((5, 5, 3), shade % 256, np.uint8)).save(folder / f"{n}.{suffix}")
    return folder


def tree(source, *classes):
    for name in classes:
        draw(source / name)
    return source


def keys(source, **kwargs):
    splits, _ = folder_splits(source, FORM, **kwargs)
    return {split: [record.key for record in found] for split, found in splits.items()}


def refused(source, what, **kwargs):
    with pytest.raises(DataError, match=what) as caught:
        folder_splits(source, FORM, **kwargs)
    assert "\n" not in str(caught.value)


def test_the_users_split_is_kept(tmp_path):
    tree(tmp_path, "train/a", "train/b", "val/c", "test/a")
    assert keys(tmp_path) == {"train": ["a", "b"], "val": ["c"], "test": ["a"]}
    assert keys(tree(tmp_path / "single", "train/a")) == {"train": ["a"]}


def test_a_folder_without_a_split_is_cut_in_proportion(tmp_path):
    tree(tmp_path, *(f"c{n:02d}" for n in range(25)))
    found = keys(tmp_path)
    assert {split: len(names) for split, names in found.items()} == {"train": 16, "val": 4, "test": 5}
    assert sorted(itertools.chain(*found.values())) == [f"c{n:02d}" for n in range(25)]
    assert found == keys(tmp_path, seed=0) != keys(tmp_path, seed=1)
    assert list(keys(tmp_path, parts=(1, 0, 0))) == ["train"]
    halves = keys(tmp_path, parts=(1, 0, 1))
    assert {split: len(names) for split, names in halves.items()} == {"train": 13, "test": 12}


def test_the_split_of_a_seed_never_changes(tmp_path):
    tree(tmp_path, *"abcdefgh")
    assert keys(tmp_path, seed=3, parts=(4, 2, 2)) == {
        "train": ["g", "a", "f", "d"],
        "val": ["b", "c"],
        "test": ["h", "e"],
    }


@pytest.mark.parametrize("parts", [p for p in itertools.product((0, 1, 9, 1000), repeat=3) if p[0]])
def test_every_split_with_a_part_has_a_class_at_least(tmp_path, parts):
    for count in range(sum(part > 0 for part in parts), 8):
        sizes = {split: len(names) for split, names in keys(_classes(tmp_path, count), parts=parts).items()}
        assert sum(sizes.values()) == count and min(sizes.values()) >= 1
        assert [split in sizes for split in ("train", "val", "test")] == [part > 0 for part in parts]


def _classes(tmp_path, count):
    """Image files need not be images as long as nothing is decoded."""
    source = tmp_path / str(count)
    for n, name in itertools.product(range(count), ("x.png", "y.png")):
        (source / str(n)).mkdir(parents=True, exist_ok=True)
        (source / str(n) / name).touch()
    return source


@pytest.mark.parametrize("parts", [(0, 1, 1), (1, -1, 1), (-1, 1, 1), (1, 1), (0, 0, 0)])
def test_parts_that_are_none_are_refused(tmp_path, parts):
    refused(tree(tmp_path, "a", "b", "c"), "--parts: .* three numbers are needed", parts=parts)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(tmp_path, seed):
    refused(tree(tmp_path, "a", "b", "c"), f"--seed: {seed} given", seed=seed)


def test_folders_within_a_class_belong_to_it(tmp_path):
    tree(tmp_path, "train/a", "train/a/more/b", "train/a/c", "train/d/e")
    splits, _ = folder_splits(tmp_path, FORM)
    (first, second) = splits["train"]
    assert (first.key, second.key) == ("a", "d")
    assert first.load().sources == tuple(f"train/a/{name}" for name in SIX) and first.shape[0] == 6
    assert second.load().sources == ("train/d/e/0.png", "train/d/e/1.png")


def test_an_image_in_no_class_is_refused(tmp_path):
    tree(tmp_path, "a", "b", "c")
    (tmp_path / "x.png").touch()
    refused(tmp_path, r"x\.png is in no class's folder; move it into one, or remove it")


def test_names_become_keys_and_two_of_one_key_are_refused(tmp_path):
    tree(tmp_path, "a b", "c.d", "ü")
    assert sorted(itertools.chain(*keys(tmp_path).values())) == ["_", "a_b", "c_d"]
    tree(tmp_path, "a.b")
    refused(tmp_path, r"the folders 'a[ .]b' and 'a[ .]b' in .* would both be class 'a_b'; rename one of them")


def test_hidden_and_other_files_are_ignored(tmp_path):
    tree(tmp_path / "plain", "a", "b", "c")
    tree(tmp_path / "more", "a", "b", "c", ".cache", ".git/x")
    (tmp_path / "more" / "a" / ".0.png").write_text("hidden")
    (tmp_path / "more" / "a" / "readme.txt").write_text("no image")
    (tmp_path / "more" / "empty").mkdir()
    (plain, digest), (more, again) = (folder_splits(tmp_path / name, FORM) for name in ("plain", "more"))
    assert digest == again
    assert {s: [(r.key, r.shape) for r in rs] for s, rs in plain.items()} == {
        s: [(r.key, r.shape) for r in rs] for s, rs in more.items()
    }


def test_suffixes_may_be_in_capitals(tmp_path):
    draw(tmp_path / "a", suffix="PNG")
    draw(tmp_path / "a", suffix="Jpeg")
    draw(tmp_path / "a", suffix="JPG")
    splits, _ = folder_splits(tmp_path, FORM, parts=(1, 0, 0))
    assert splits["train"][0].shape == (6, 4, 4, 3)
    assert len(splits["train"][0].load().images) == 6


def test_missing_and_empty_folders_and_files_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folder with images")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "there is no folder")
    refused(tree(tmp_path / "two", "a", "b"), "holds 2 classes, at least 3 are needed for 3 splits")
    tree(tmp_path / "half", "train/a")
    (tmp_path / "half" / "val").mkdir()
    refused(tmp_path / "half", "half/val holds no folder with images")


@pytest.mark.parametrize("other", ["validation", "extra"])
def test_a_split_with_other_names_is_not_taken_for_classes(tmp_path, other):
    refused(tree(tmp_path, "train/a", "test/b", f"{other}/c"), f"beside test and train, .* holds {other}")


def test_a_class_may_be_called_train(tmp_path):
    assert sum(map(len, keys(tree(tmp_path, "train", "plane", "ship")).values())) == 3


def test_links_that_lead_out_are_refused_and_others_followed(tmp_path):
    source = tree(tmp_path / "source", "a", "b", "c")
    (source / "a" / "in.png").symlink_to(source / "b" / "0.png")
    assert sum(map(len, keys(source).values())) == 3
    draw(tmp_path / "outside")
    link = source / "a" / "out.png"
    link.symlink_to(tmp_path / "outside" / "0.png")
    refused(source, r"a/out\.png is a link that leads out of .*source")
    link.unlink()
    (source / "d").symlink_to(tmp_path / "outside")
    refused(source, "source/d is a link to a folder; put the folder itself there")
    (tmp_path / "split" / "val").mkdir(parents=True)
    (tmp_path / "split" / "train").symlink_to(source)
    refused(tmp_path / "split", "split/train is a link to a folder")
    (tmp_path / "all").symlink_to(tree(tmp_path / "whole", "a", "b", "c"))
    assert keys(tmp_path / "all") == keys(tmp_path / "whole")


def test_a_class_of_one_image_is_refused(tmp_path):
    draw(tmp_path / "a", images=1)
    refused(tmp_path, "class 'a' has 1 readable images, at least 2 are needed", parts=(1, 0, 0))


def test_the_same_folder_gives_the_same_bytes_in_whatever_order_it_is_listed(tmp_path, monkeypatch):
    tree(tmp_path / "in", "b", "a", "c/d", "c/e")

    def write(name):
        splits, digest = folder_splits(tmp_path / "in", FORM)
        write_dataset(tmp_path / name, "x", splits, {"sha256": digest})
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = write("first")
    walk = os.walk

    def backwards(*args, **kwargs):
        for current, folders, files in walk(*args, **kwargs):
            folders.reverse()
            yield current, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert write("second") == first


def test_the_digest_changes_with_names_and_sizes(tmp_path):
    tree(tmp_path, "a", "b", "c")
    digests = {folder_splits(tmp_path, FORM)[1]}
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "z.png")
    digests.add(folder_splits(tmp_path, FORM)[1])
    with open(tmp_path / "a" / "1.png", "ab") as file:
        file.write(b"x")
    digests.add(folder_splits(tmp_path, FORM)[1])
    assert len(digests) == 3


@pytest.mark.parametrize("k", range(1, 9))
def test_images_that_were_skipped_before_an_interruption_are_listed_too(tmp_path, k):
    source = tree(tmp_path / "in", "train/a", "train/b", "test/c")
    bad = [source / "train" / "a" / "bad.png", source / "test" / "c" / "bad.jpg", source / "test" / "c" / "ugly.png"]
    for path in bad:
        path.write_text("no image")

    def write(place):
        splits, digest = folder_splits(source, FORM, skip_bad=True)
        write_dataset(place, "x", splits, {"sha256": digest}, shard_bytes=1)

    with pytest.raises(StorageError):
        write(Breaking(tmp_path / "out", k))
    write(Folder(tmp_path / "out"))
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in listed] == [path.relative_to(source).as_posix() for path in bad]
    assert Counter(
        c.shape[0] for split in ("train", "test") for c in Dataset(str(tmp_path / "out")).classes(split)
    ) == {2: 3}


@pytest.mark.parametrize("mended", [True, False], ids=["mended", "left out"])
def test_images_of_finished_shards_are_not_decoded_again(tmp_path, monkeypatch, mended):
    source, decoded = tree(tmp_path / "in", "train/a", "train/b", "train/c"), []
    bad = source / "train" / "c" / "2.png"
    bad.write_text("no image")
    real = decode._decoded
    monkeypatch.setattr(decode, "_decoded", lambda path, form: decoded.append(path.parent.name) or real(path, form))

    def write(name, skip_bad=False):
        splits, digest = folder_splits(source, FORM, skip_bad=skip_bad)
        facts = {"sha256": digest, "skip_bad": skip_bad}
        return write_dataset(tmp_path / name, "x", splits, facts, settings={"size": 4}, shard_bytes=1)

    with pytest.raises(DataError, match=r"c/2\.png is not a readable PNG or JPEG image .* --skip-bad"):
        write("out")
    if mended:
        bad.write_bytes((source / "train" / "a" / "0.png").read_bytes())
    decoded.clear()
    index = write("out", skip_bad=not mended)
    assert decoded == ["c"] * 3
    assert index == write("undisturbed", skip_bad=not mended)
    assert index.provenance.get("skipped", {"images": 0})["images"] == (not mended)
