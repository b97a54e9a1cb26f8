"""`imaml prepare` as a user meets it: to folders and object storage, again, interrupted, and with every mistake in one sentence."""

import numpy as np
import pytest
import webdataset
from helpers.command import imaml_here
from helpers.datasets import shard
from helpers.gloo import free_port
from PIL import Image

from imaml_dist.data.dataset import CacheOptions, Dataset
from imaml_dist.data.prepare import mini_imagenet
from imaml_dist.errors import StorageError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.opening import open_storage


def imaml(*args, cwd):
    """Exit code and what is printed, but progress."""
    code, output = imaml_here(*map(str, args), cwd=cwd)
    assert "Traceback" not in output
    return code, [line for line in output.splitlines() if not line.startswith(("writing classes", "reading shards"))]


def draw(folder, names=("0.png", "1.png")):
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), sum(folder.name.encode()) + 9 * n & 255, np.uint8)).save(folder / name)


@pytest.fixture
def photos(tmp_path):
    for name in "abcdef":
        draw(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of mini-ImageNet at the size of a test."""
    monkeypatch.setattr(mini_imagenet, "CLASSES", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(mini_imagenet, "IMAGES", 2)
    for split, labels in {"train": ["n1", "n2"], "val": ["n3"], "test": ["n4"]}.items():
        names = {label: [f"{label}_{n}.jpg" for n in range(2)] for label in labels}
        for of_label in names.values():
            draw(tmp_path / "mini" / "images", of_label)
        lines = ["filename,label", *(f"{name},{label}" for label in labels for name in names[label])]
        (tmp_path / "mini" / f"{split}.csv").write_text("\n".join(lines))
    return tmp_path / "mini"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "folder",
            ["--source", "--out", "--name", "--size", "--grey", "--seed", "--parts", "--skip-bad", "--endpoint"],
        ),
        ("mini-imagenet", ["--source", "--out", "--size", "--skip-bad", "--endpoint"]),
        ("shards", ["--out", "--name", "--endpoint"]),
    ],
)
def test_help_names_every_option(kind, options, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, lines = imaml("prepare", kind, "--help", cwd=tmp_path)
    assert code == 0
    assert [option for option in options if option not in "\n".join(lines)] == []


def test_a_folder_of_images_becomes_a_data_set_and_once_is_enough(photos, tmp_path):
    command = ["prepare", "folder", "--source", "photos", "--out", "out", "--name", "photos", "--size", 4, "--grey"]
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 0
    fingerprint = Dataset(str(tmp_path / "out")).index.fingerprint[:12]
    told = f"photos with 4 train classes, 1 val classes, 1 test classes, 12 images, fingerprint {fingerprint}"
    warned = [f"the {split} split has 1 class, an episode needs two: see --parts" for split in ("val", "test")]
    assert lines == [f"out: {told}", *warned]
    assert imaml(*command, cwd=tmp_path) == (0, [f"out is already prepared: {told}"])
    assert Dataset(str(tmp_path / "out")).index.image_shape == (1, 4, 4)
    assert imaml("verify", "out", cwd=tmp_path)[0] == 0
    draw(photos / "a", ["2.png"])
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 0 and "preparing again" in lines[0] and lines[1].startswith("out: photos with 4 train classes")


def test_a_folder_of_images_goes_to_object_storage(photos, tmp_path, moto_bucket):
    url, options = moto_bucket
    command = ["prepare", "folder", "--source", photos, "--size", 4]
    assert imaml(*command, "--out", "here", cwd=tmp_path)[0] == 0
    there = [*command, "--out", f"{url}/photos", "--endpoint", options.endpoint]
    code, lines = imaml(*there, cwd=tmp_path)
    assert code == 0 and lines[0].startswith(f"{url}/photos: images with 4 train classes")
    code, lines = imaml(*there, cwd=tmp_path)
    assert code == 0 and lines[0].startswith(f"{url}/photos is already prepared: images with")
    bucket = open_storage(f"{url}/photos", options)
    assert {name: bucket.read(name) for name, _ in bucket.names()} == {
        path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()
    }
    dataset, here = Dataset(f"{url}/photos", options, CacheOptions(tmp_path / "cache")), Dataset(str(tmp_path / "here"))
    for entry in here.classes("train"):
        np.testing.assert_array_equal(dataset.images(entry), here.images(entry))
    dataset.close()


def test_images_that_cannot_be_read_are_skipped_and_named_if_wanted(photos, tmp_path, monkeypatch):
    for place in ("a/bad.png", "f/ugly.jpg"):
        (photos / place).write_text("no image")
    command = ["prepare", "folder", "--source", "photos", "--out", "out", "--size", 4]
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("imaml: photos/") and "--skip-bad" in lines[0]
    write, fails = Folder.write, iter([False, False, False, True])

    def broken(self, *args, **kwargs):
        if next(fails, False):
            raise StorageError("the disk is gone")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Folder, "write", broken)
    assert imaml(*command, "--skip-bad", cwd=tmp_path) == (3, ["imaml: the disk is gone"])
    code, lines = imaml(*command, "--skip-bad", cwd=tmp_path)
    assert code == 0
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split(" ")[0] for line in listed) == ["a/bad.png", "f/ugly.jpg"]
    assert lines[:2] == [f"skipped: {line}" for line in listed]
    assert lines[2] == "2 images were skipped; they are listed in out/skipped.txt"


def test_mini_imagenet_becomes_a_data_set_and_once_is_enough(copy, tmp_path):
    command = ["prepare", "mini-imagenet", "--source", "mini", "--out", "out", "--size", 4]
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 0 and lines[0].startswith("out: mini-imagenet with 2 train classes, 1 val classes, 1 test classes")
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 0 and lines[0].startswith("out is already prepared: mini-imagenet")
    assert Dataset(str(tmp_path / "out")).classes("train")[1].key == "n2"


def test_shards_of_ones_own_become_a_data_set_and_once_is_enough(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar")) as writer:
        writer.write({"__key__": "a", "images.npy": np.ones((2, 4, 4, 1), np.uint8)})
    code, lines = imaml("prepare", "shards", "--out", ".", "--name", "mine", cwd=tmp_path)
    assert code == 0 and lines[0].startswith(".: mine with 1 train classes")
    code, lines = imaml("prepare", "shards", "--out", ".", "--name", "mine", cwd=tmp_path)
    assert code == 0 and lines[0].startswith(".: is already prepared: mine with 1 train classes")


FOLDER = ["prepare", "folder", "--source", "photos", "--out", "out"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["prepare", "folder", "--source", "nowhere", "--out", "out"], "--source: there is no folder nowhere"),
        (["prepare", "folder", "--source", "empty", "--out", "out"], "--source: empty holds no folder with images"),
        (["prepare", "folder", "--source", "s3://b/x", "--out", "out"], "scheme 's3' is not supported"),
        ([*FOLDER, "--size", "0"], "--size: 0 given, images have 1 to 1024 pixels a side"),
        ([*FOLDER, "--size", "1025"], "--size: 1025 given"),
        ([*FOLDER, "--parts", "0", "1", "1"], "--parts: [0, 1, 1] given, three numbers are needed"),
        ([*FOLDER, "--seed", "-1"], "--seed: -1 given"),
        (["prepare", "mini-imagenet", "--source", "nowhere"], "--source: nowhere/train.csv does not exist"),
        (["prepare", "mini-imagenet", "--source", "mini", "--size", "-3"], "--size: -3 given"),
        (["prepare", "shards", "--out", "empty"], "empty holds no shard named as train-000000.tar"),
        (["prepare", "shards", "--out", "nowhere"], "nowhere holds no shard named as train-000000.tar"),
    ],
)
def test_mistakes_are_told_in_one_sentence(photos, tmp_path, command, says):
    (tmp_path / "empty").mkdir()
    code, lines = imaml(*command, cwd=tmp_path)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("imaml: ") and says in lines[0]
    assert not (tmp_path / "out").exists()


def test_parts_that_are_no_numbers_are_told(tmp_path):
    code, lines = imaml(*FOLDER, "--parts", "a", "b", "c", cwd=tmp_path)
    assert code == 2 and "--parts" in "\n".join(lines)


def test_another_data_set_is_never_overwritten(data, photos, tmp_path):
    before = Dataset(str(data)).index
    for command in (["folder", "--source", photos], ["shards"]):
        code, lines = imaml("prepare", *command, "--out", data, cwd=tmp_path)
        assert (code, len(lines)) == (2, 1)
        assert lines[0] == f"imaml: {data} already holds the data set 'blobs'; choose another --out"
    assert Dataset(str(data)).index == before


def test_an_index_that_cannot_be_read_is_replaced_by_its_own_kind_only(photos, tmp_path):
    command = ["prepare", "folder", "--source", photos, "--size", 4, "--out", "here"]
    assert imaml(*command, cwd=tmp_path)[0] == 0
    index = tmp_path / "here" / "index.json"
    whole = index.read_text()
    index.write_text(whole.replace('"version": 2', '"version": 1'))
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    for other in (["glyphs"], ["shards"]):
        code, lines = imaml("prepare", *other, "--out", "here", cwd=tmp_path)
        assert (code, len(lines)) == (2, 1)
        assert lines[0].startswith("imaml: here already holds an index.json which cannot be read and does not say")
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 0 and lines[0].startswith("preparing again: here/index.json: format") and index.read_text() == whole


@pytest.mark.parametrize("kind", ["omniglot", "glyphs"])
@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_out_of_its_range_is_told_before_anything_is_done(tmp_path, kind, seed):
    code, lines = imaml("prepare", kind, "--seed", seed, "--out", "out", cwd=tmp_path)
    assert (code, lines) == (2, [f"imaml: --seed: {seed} given, seeds are 0 to 2^64 - 1"])
    assert not (tmp_path / "out").exists()


def test_a_refused_preparation_leaves_the_data_set_that_was_there(photos, tmp_path):
    command = ["prepare", "folder", "--source", photos, "--size", 16, "--out", "here"]
    assert imaml(*command, cwd=tmp_path)[0] == 0
    before = Dataset(str(tmp_path / "here")).index
    draw(photos / "a", ("2.png",))
    broken = photos / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    code, lines = imaml(*command, cwd=tmp_path)
    assert code == 2 and "is not a readable" in lines[-1] and not any("Traceback" in line for line in lines)
    assert Dataset(str(tmp_path / "here")).index == before
    code, lines = imaml("prepare", "glyphs", "--out", "here", cwd=tmp_path)
    assert code == 2 and lines[-1].endswith("already holds the data set 'images'; choose another --out")
    code, lines = imaml("verify", "here", cwd=tmp_path)
    assert code == 0
    code, lines = imaml(*command, "--skip-bad", cwd=tmp_path)
    assert code == 0 and any(
        "preparing again (sha256: " in line and "skip_bad: False -> True" in line for line in lines
    )


def test_fresh_mends_what_sizes_do_not_show(photos, tmp_path):
    command = ["prepare", "folder", "--source", photos, "--size", 16, "--out", "here"]
    imaml(*command, cwd=tmp_path)
    path = shard(tmp_path / "here", "train")
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    code, lines = imaml("verify", "here", cwd=tmp_path)
    assert code == 2 and lines[-1].endswith("prepare the data set again with --fresh")
    assert "is already prepared" in imaml(*command, cwd=tmp_path)[1][-1]
    assert imaml(*command, "--fresh", cwd=tmp_path)[0] == 0
    assert path.read_bytes() == content


def test_a_missing_bucket_is_known_before_anything_is_rendered(moto, aws, tmp_path):
    code, lines = imaml("prepare", "glyphs", "--out", "s3://no-such-bucket/glyphs", "--endpoint", moto, cwd=tmp_path)
    assert (code, len(lines)) == (2, 1) and "the bucket does not exist" in lines[0]
    code, lines = imaml("verify", "s3://no-such-bucket/glyphs", "--endpoint", moto, cwd=tmp_path)
    assert code == 2 and "the bucket does not exist" in lines[0]


def test_how_long_to_ask_again_is_the_users_choice(aws, tmp_path):
    where = ["s3://bucket/x", "--endpoint", f"http://127.0.0.1:{free_port()}", "--retry-seconds", 0.5]
    code, lines = imaml("verify", *where, cwd=tmp_path)
    assert code == 3 and "(storage.retry_seconds is 0.5)" in lines[-1]
