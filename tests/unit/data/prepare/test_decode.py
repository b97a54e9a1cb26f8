"""Image files of every kind become arrays of one kind; bombs and whatever is no image are refused before they cost anything."""

import contextlib
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from imaml_dist.data.prepare.decode import MAX_BYTES, Form, decode, image_class, source_digest
from imaml_dist.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


def save(path, pixels, mode=None, **kwargs):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **kwargs)
    return path


def png_header(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


def test_an_image_of_the_wanted_size_comes_back_as_it_is(tmp_path):
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", NOISE), Form(12)), NOISE)
    grey = decode(save(tmp_path / "g.png", NOISE[..., 0]), Form(12, grey=True))
    np.testing.assert_array_equal(grey, NOISE[..., :1])


@pytest.mark.parametrize(("shape", "cut"), [((12, 30), np.s_[:, 9:21]), ((30, 12), np.s_[9:21])])
def test_the_centred_square_is_cut_out(tmp_path, shape, cut):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", pixels), Form(12)), pixels[cut])


@pytest.mark.parametrize("size", [1, 5, 84])
@pytest.mark.parametrize("grey", [False, True])
def test_every_size_and_kind_is_brought_into_one_form(tmp_path, size, grey):
    form = Form(size, grey)
    files = [
        save(tmp_path / "grey.png", NOISE, "L"),
        save(tmp_path / "alpha.png", NOISE, "RGBA"),
        save(tmp_path / "grey-alpha.png", NOISE, "LA"),
        save(tmp_path / "palette.png", NOISE, "P"),
        save(tmp_path / "transparent.png", NOISE, "P", transparency=0),
        save(tmp_path / "bits.png", NOISE, "1"),
        save(tmp_path / "cmyk.jpg", NOISE, "CMYK"),
        save(tmp_path / "grey.jpeg", NOISE, "L"),
        save(tmp_path / "progressive.JPG", NOISE, format="JPEG", progressive=True),
        save(tmp_path / "pixel.png", NOISE[:1, :1]),
    ]
    for path in files:
        assert decode(path, form).shape == (size, size, form.channels), path.name
        assert decode(path, form).dtype == np.uint8


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA"])
def test_colours_survive_whatever_they_are_stored_as(tmp_path, mode):
    pixels = np.full((8, 8, 3), (200, 40, 90), np.uint8)
    suffix = "jpg" if mode == "CMYK" else "png"
    found = decode(save(tmp_path / f"a.{suffix}", pixels, mode), Form(8))
    assert np.abs(found.astype(int) - pixels).max() <= (51 if mode == "P" else 3)  # the web palette has steps of 51


def test_sixteen_bits_become_their_upper_eight(tmp_path):
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for grey in (False, True):
        found = decode(save(tmp_path / "deep.png", pixels), Form(8, grey))
        np.testing.assert_array_equal(found[..., 0], pixels >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_their_exif_says(tmp_path, orientation):
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", NOISE, exif=exif), Form(12)), undo(NOISE))


def refused(path, what):
    with pytest.raises(DataError, match=what) as caught:
        decode(path, Form(8))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError) as again:  # reasons are listed, and lists are compared
        decode(path, Form(8))
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (5000, 3356)])
def test_a_bomb_is_refused_by_its_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    begin = time.monotonic()
    refused(path, f"{width} x {height} pixels, at most 16777216|DecompressionBombError")
    assert time.monotonic() - begin < 1


def test_a_file_that_is_too_large_is_refused(tmp_path):
    path = save(tmp_path / "a.png", NOISE)
    with open(path, "r+b") as file:
        file.truncate(MAX_BYTES)
    assert decode(path, Form(12)).shape == (12, 12, 3)
    with open(path, "r+b") as file:
        file.truncate(MAX_BYTES + 1)
    refused(path, "is larger than 32 MiB")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_other_formats_are_refused_under_any_name(tmp_path, kind):
    refused(save(tmp_path / "a.png", NOISE, format=kind), "not a readable PNG or JPEG")


@pytest.mark.parametrize(
    "content", [b"", b"text\n" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n", png_header(8, 8), b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    refused(path, "not a readable PNG or JPEG")


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    refused(tmp_path / "a.png", "FileNotFoundError")
    refused(tmp_path, "IsADirectoryError")
    os.mkfifo(tmp_path / "b.png")
    refused(tmp_path / "b.png", "not a readable PNG or JPEG")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_refused(tmp_path, suffix):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"a.{suffix}", pixels)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        refused(path, "not a readable PNG or JPEG")


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_images_are_refused_or_decoded_and_nothing_else_happens(tmp_path):
    exif = Image.Exif()
    exif[274], exif[282], exif[271] = 6, 72.0, "maker"
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg"):
        path = save(tmp_path / f"a.{suffix}", NOISE, exif=exif, icc_profile=b"x" * 200)
        content = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for place in generator.integers(0, len(content), 3):
                damaged[place] = generator.integers(256)
            if suffix == "png":
                damaged = mended(damaged)
            path.write_bytes(damaged)
            with contextlib.suppress(DataError):
                assert decode(path, Form(8)).shape == (8, 8, 3)


def mended(png):
    """With checksums that fit, so that damage goes deeper."""
    place = 8
    while place + 12 <= len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        end = place + 8 + length
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[place + 4 : end]))
        place = end + 4
    return png


def test_a_class_has_its_images_in_bytewise_order_of_their_paths(tmp_path):
    files = [save(tmp_path / f"{name}.png", np.full((4, 4, 3), n, np.uint8)) for n, name in enumerate("bBaé")]
    lazy = image_class("k", files, tmp_path, Form(4), skip_bad=False)
    assert (lazy.key, lazy.shape) == ("k", (4, 4, 4, 3))
    record = lazy.load()
    assert record.sources == ("B.png", "a.png", "b.png", "é.png")
    assert record.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3]
    np.testing.assert_array_equal(
        image_class("k", files[::-1], tmp_path, Form(4), skip_bad=False).load().images, record.images
    )


def test_an_image_that_cannot_be_read_stops_a_class_or_is_skipped(tmp_path):
    files = [save(tmp_path / f"{n}.png", NOISE) for n in range(4)]
    files[1].write_text("text")
    files[3].write_bytes(png_header(20_000, 20_000))
    with pytest.raises(DataError, match=r"1\.png is not a readable .* --skip-bad"):
        image_class("k", files, tmp_path, Form(4), skip_bad=False).load()
    record = image_class("k", files, tmp_path, Form(4), skip_bad=True).load()
    assert record.sources == ("0.png", "2.png") and record.images.shape == (2, 4, 4, 3)
    assert [line.split(" ")[0] for line in record.skipped] == ["1.png", "3.png"]
    files[0].write_text("text")
    with pytest.raises(DataError, match="class 'k' has 1 readable images, at least 2 are needed"):
        image_class("k", files, tmp_path, Form(4), skip_bad=True).load()


def test_a_class_of_one_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="class 'k' has 1 readable images, at least 2 are needed"):
        image_class("k", [save(tmp_path / "a.png", NOISE)], tmp_path, Form(4), skip_bad=True)


def test_the_digest_changes_with_classes_names_and_sizes_alone(tmp_path):
    files = [save(tmp_path / f"{n}.png", NOISE) for n in range(3)]

    def digest(split="train", key="k"):
        classes = [image_class(key, files, tmp_path, Form(4), skip_bad=False)]
        return source_digest({split: classes, "val": []})

    first = digest()
    save(files[0], NOISE)
    assert digest() == first
    digests = {first, digest("test"), digest(key="l")}
    with open(files[0], "ab") as file:
        file.write(b"x")
    digests.add(digest())
    files[1] = files[1].rename(tmp_path / "z.png")
    digests.add(digest())
    assert len(digests) == 5
