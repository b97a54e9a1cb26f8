"""mini-ImageNet at the size of a test: the split of its CSV files, images wherever people keep them, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from imaml_dist.data.prepare import mini_imagenet
from imaml_dist.data.prepare.decode import Form
from imaml_dist.data.prepare.mini_imagenet import mini_imagenet_splits
from imaml_dist.errors import DataError

LABELS = {"train": ["n02", "n01", "n03"], "val": ["n04"], "test": ["n05", "n06"]}
FORM = Form(4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "CLASSES", {split: len(labels) for split, labels in LABELS.items()})
    monkeypatch.setattr(mini_imagenet, "IMAGES", 3)


def names(label):
    return [f"{label}{n:04d}.jpg" for n in (2, 0, 1)]


def write(source, place="images"):
    """A copy with its images in one of the three places."""
    for split, labels in LABELS.items():
        lines = ["filename,label", *(f"{name},{label}" for label in labels for name in names(label))]
        source.mkdir(exist_ok=True)
        (source / f"{split}.csv").write_text("\r\n".join(lines) + "\r\n")
        for label in labels:
            folder = source / place.format(label)
            folder.mkdir(parents=True, exist_ok=True)
            for n, name in enumerate(sorted(names(label))):
                Image.fromarray(np.full((6, 9, 3), 40 * n + int(label[1:]), np.uint8)).save(folder / name)
    return source


def refused(source, what, **kwargs):
    with pytest.raises(DataError, match=what) as caught:
        mini_imagenet_splits(source, FORM, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["images", "{}", "images/{}"])
def test_images_are_found_wherever_people_keep_them(tmp_path, place):
    splits, _ = mini_imagenet_splits(write(tmp_path, place), FORM)
    assert {split: [record.key for record in records] for split, records in splits.items()} == LABELS
    for record in (lazy.load() for records in splits.values() for lazy in records):
        assert record.name == record.key
        assert record.images[:, 0, 0, 0].tolist() == pytest.approx(
            [40 * n + int(record.key[1:]) for n in range(3)], abs=2
        )
        assert record.sources == tuple(f"{place.format(record.key)}/{name}" for name in sorted(names(record.key)))


def test_the_digest_is_of_the_source(tmp_path):
    digest = mini_imagenet_splits(write(tmp_path / "a"), FORM)[1]
    assert mini_imagenet_splits(write(tmp_path / "b"), FORM)[1] == digest
    text = (tmp_path / "b" / "val.csv").read_text()
    (tmp_path / "b" / "val.csv").write_text(text.replace("n040001.jpg", "n050001.jpg"))
    assert mini_imagenet_splits(tmp_path / "b", FORM)[1] != digest


def test_a_missing_csv_or_image_is_refused(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere/train\.csv does not exist; give the folder")
    source = write(tmp_path / "a")
    (source / "val.csv").rename(source / "kept.csv")
    refused(source, r"val\.csv does not exist")
    (source / "kept.csv").rename(source / "val.csv")
    (source / "images" / "n050001.jpg").unlink()
    refused(
        source, r"the image n050001\.jpg of class n05 is neither in .*images, .*n05 nor .*images/n05; copy it there"
    )


def test_missing_and_damaged_images_are_skipped_if_wanted(tmp_path):
    source = write(tmp_path)
    (source / "images" / "n050001.jpg").unlink()
    (source / "images" / "n010000.jpg").write_text("text")
    splits, _ = mini_imagenet_splits(source, FORM, skip_bad=True)
    loaded = {lazy.key: lazy.load() for records in splits.values() for lazy in records}
    assert {key: len(record.images) for key, record in loaded.items() if record.skipped} == {"n05": 2, "n01": 2}
    assert "n050001.jpg" in loaded["n05"].skipped[0] and "n010000.jpg" in loaded["n01"].skipped[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "lists 0 classes of 0 to 0 images, mini-ImageNet has 1 of 3"),
        (b"filename,label\n", "lists 0 classes"),
        (b"file,label\na.jpg,n04\n", "cannot be read as a CSV file with the columns filename and label"),
        (b"a.jpg;n04\n" * 4, "cannot be read as a CSV file"),
        (b"\xff\xfe\x00", "cannot be read as a CSV file"),
        (b"filename,label\na.jpg,n04\nb.jpg,n04\n", "lists 1 classes of 2 to 2 images"),
        (b"filename,label\na.jpg,n04\nb.jpg,n04\nc.jpg,n04\nd.jpg,n07\n", "lists 2 classes of 1 to 3 images"),
        (b"filename,label\na.jpg,n04\na.jpg,n04\nb.jpg,n04\n", r"val\.csv lists 'a\.jpg' of label 'n04' twice"),
        (b"filename,label\na.jpg\n", "not plain names"),
        (b"filename,label\n,n04\n", "not plain names"),
    ],
)
def test_a_csv_of_another_kind_is_refused(tmp_path, content, says):
    source = write(tmp_path)
    (source / "val.csv").write_bytes(content)
    refused(source, says)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/b.jpg", "..", ".", ".hidden.jpg", "a/"])
@pytest.mark.parametrize("row", ["{},n04", "a.jpg,{}"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name, row):
    source = write(tmp_path)
    (source / "val.csv").write_text("filename,label\n" + row.format(name) + "\n")
    refused(source, "not plain names", skip_bad=True)


def test_a_huge_csv_is_refused_unread(tmp_path):
    source = write(tmp_path)
    with open(source / "val.csv", "r+b") as file:
        file.truncate((16 << 20) + 1)
    refused(source, "is larger than 16 MiB")


def test_links_that_lead_out_are_refused(tmp_path):
    source = write(tmp_path / "a")
    (source / "images").rename(tmp_path / "elsewhere")
    (source / "images").symlink_to(tmp_path / "elsewhere")
    refused(source, r"images/n02\d+\.jpg is a link that leads out of .*/a; put the image itself there", skip_bad=True)


def test_a_csv_saved_by_a_spreadsheet_is_read_and_labels_of_other_characters_are_refused(tmp_path):
    source = write(tmp_path)
    content = (source / "val.csv").read_bytes()
    (source / "val.csv").write_bytes(b"\xef\xbb\xbf" + content)
    assert mini_imagenet_splits(source, FORM)[0]["val"][0].key == "n04"
    (source / "val.csv").write_bytes(content.replace(b",n04", b",n 4"))
    refused(source, "not plain names")


def test_links_that_lead_out_and_labels_that_are_no_keys_are_refused(tmp_path):
    source = write(tmp_path / "source")
    image = source / "images" / "n040001.jpg"
    image.rename(tmp_path / "kept.jpg")
    image.symlink_to(tmp_path / "kept.jpg")
    refused(source, r"n040001\.jpg is a link that leads out of .*source", skip_bad=True)
    (source / "val.csv").write_text("filename,label\na.jpg,n 4\n")
    refused(source, "label 'n 4': not plain names")
