"""Omniglot from archives, folders and servers: real archives where they are at hand, made ones for what goes wrong."""

import functools
import hashlib
import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaml_dist.data.prepare import omniglot
from imaml_dist.errors import DataError, StorageError

REAL = os.environ.get("IMAML_OMNIGLOT")


def _png(seed: int, size: int = 105) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).random((size, size)) > 0.1
    Image.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def small(monkeypatch):
    """The rules of Omniglot at the size of a test: 7 characters of 3 drawings."""
    monkeypatch.setattr(omniglot, "CHARACTERS", 7)
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    monkeypatch.setattr(omniglot, "SPLIT_SIZES", {"train": 4, "val": 1, "test": 2})


def _files() -> dict[str, bytes]:
    files = {}
    for c in range(7):
        folder = "images_background/Japanese_(hiragana)" if c < 4 else "images_evaluation/ULOG"
        for d in range(3):
            files[f"{folder}/character{c:02d}/{c:04d}_{d:02d}.png"] = _png(10 * c + d)
    return files


def _archives(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name in omniglot.ARCHIVES:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path, data in files.items():
                if path.startswith(name):
                    archive.writestr(path, data)
    return folder


def _unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def _one_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"omniglot-master/python/{name}", data)
    return path


def test_archives_folders_and_one_zip_hold_the_same_characters(small, tmp_path):
    files = _files()
    sources = [
        _archives(tmp_path / "zips", files),
        _unpacked(tmp_path / "folders", files),
        _one_zip(tmp_path / "all.zip", files),
    ]
    read = [omniglot.omniglot_splits(str(source))[0] for source in sources]
    for splits in read:
        assert {s: len(r) for s, r in splits.items()} == {"train": 4, "val": 1, "test": 2}
        for split, kept in splits.items():
            assert [r.key for r in kept] == [r.key for r in read[0][split]]
            for mine, theirs in zip(kept, read[0][split], strict=True):
                np.testing.assert_array_equal(mine.images, theirs.images)
    keys = [r.key for kept in read[0].values() for r in kept]
    assert len(set(keys)) == 7
    assert "Japanese__hiragana_/character00" in keys


def test_images_are_ink_on_empty_background(small, tmp_path):
    splits, digests = omniglot.omniglot_splits(str(_archives(tmp_path / "zips", _files())))
    images = splits["train"][0].images
    assert images.shape == (3, 28, 28, 1)
    assert 10 < images.mean() < 60, "a tenth of the made pixels is ink"
    assert all(len(digest) == 64 for digest in digests.values())


def test_seed_decides_the_split(small, tmp_path):
    source = str(_archives(tmp_path / "zips", _files()))
    orders = {tuple(r.key for r in omniglot.omniglot_splits(source, seed)[0]["test"]) for seed in range(6)}
    assert len(orders) > 1


def test_bad_sources_are_refused_in_one_sentence(small, tmp_path):
    files = _files()
    with pytest.raises(DataError, match="does not exist"):
        omniglot.omniglot_splits(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds 0 characters"):
        omniglot.omniglot_splits(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="1 of them without exactly 3 drawings"):
        omniglot.omniglot_splits(str(_archives(tmp_path / "short", dict(list(files.items())[1:]))))
    first = next(iter(files))
    with pytest.raises(DataError, match=f"{Path(first).name} is not a readable PNG"):
        omniglot.omniglot_splits(str(_archives(tmp_path / "broken", {**files, first: b"no image"})))
    with pytest.raises(DataError, match="is 20x20 pixels"):
        omniglot.omniglot_splits(str(_archives(tmp_path / "size", {**files, first: _png(0, 20)})))
    with pytest.raises(DataError, match="too large for a drawing"):
        omniglot.omniglot_splits(str(_archives(tmp_path / "bomb", {**files, first: bytes(1 << 20)})))
    whole = _archives(tmp_path / "cut", files) / "images_background.zip"
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        omniglot.omniglot_splits(str(tmp_path / "cut"))


@pytest.fixture
def server(tmp_path):
    """A real HTTP server on the loopback address over tmp_path/served."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_download_verifies_what_arrived(small, tmp_path, server, monkeypatch):
    served = _archives(tmp_path / "made", _files())
    digests = {name: hashlib.sha256((served / f"{name}.zip").read_bytes()).hexdigest() for name in omniglot.ARCHIVES}
    for archive in served.iterdir():
        archive.rename(tmp_path / "served" / archive.name)
    with pytest.raises(DataError, match="the official archive has"):
        omniglot.fetch(server, tmp_path / "refused")
    assert list((tmp_path / "refused").iterdir()) == []

    monkeypatch.setattr(omniglot, "ARCHIVES", digests)
    seen = []
    folder = omniglot.fetch(server, tmp_path / "kept", lambda what, done, total: seen.append((what, done, total)))
    assert {done for _, done, total in seen if done == total}, "progress reaches the end"
    assert len(omniglot.omniglot_splits(str(folder))[0]["train"]) == 4
    (tmp_path / "served" / "images_background.zip").unlink()
    omniglot.fetch(server, tmp_path / "kept")  # what is there and verifies is not fetched again


def test_unreachable_server_is_the_environments_fault(tmp_path, server):
    with pytest.raises(StorageError, match="cannot be downloaded"):
        omniglot.fetch(f"{server}/nowhere", tmp_path / "x")
    with pytest.raises(DataError, match="neither a path nor"):
        omniglot.fetch("ftp://127.0.0.1/x", tmp_path / "x")
    for url in ("http://me:geheim@127.0.0.1/x", "https://geheim@127.0.0.1:1/x"):
        with pytest.raises(DataError, match="credentials do not belong in a URL") as caught:
            omniglot.fetch(url, tmp_path / "x")
        assert "geheim" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be downloaded") as caught:
        omniglot.fetch(f"{server}/nowhere?sv=2024&sig=geheim", tmp_path / "x")
    assert "geheim" not in str(caught.value)


@pytest.mark.omniglot
@pytest.mark.skipif(not REAL, reason="needs the official Omniglot archives: set IMAML_OMNIGLOT to their folder")
def test_the_real_archives():
    splits, digests = omniglot.omniglot_splits(REAL)
    assert {split: len(records) for split, records in splits.items()} == {"train": 1100, "val": 100, "test": 423}
    assert digests == {f"{name}.zip": digest for name, digest in omniglot.ARCHIVES.items()}
    assert len({r.key for records in splits.values() for r in records}) == 1623
    assert len({r.key.split("/")[0] for records in splits.values() for r in records}) == 50
    assert {r.images.shape for records in splits.values() for r in records} == {(20, 28, 28, 1)}
