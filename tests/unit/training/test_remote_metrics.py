"""What a reader elsewhere sees of a growing file, and of one that is cut back."""

import json
import random

import pytest

from imaml_dist.errors import StorageError
from imaml_dist.storage.folder import Folder
from imaml_dist.tracking import metrics_file
from imaml_dist.training import remote_metrics
from imaml_dist.training.remote_metrics import MetricsReader, MetricsWriter


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Writer's file, reader's file, storage; pieces of a few lines."""
    monkeypatch.setattr(remote_metrics, "PIECE_BYTES", 100)
    return tmp_path / "here.jsonl", tmp_path / "there.jsonl", Folder(tmp_path / "storage")


def add(file, step, take):
    metrics_file.append(file, {"step": step, "take": take, "x": "x" * (step % 7)})


@pytest.mark.parametrize("seed", range(20))
def test_the_reader_has_what_the_writer_had(pair, seed):
    here, there, storage = pair
    draw, writer, reader, step = random.Random(seed), MetricsWriter(storage, here), MetricsReader(storage, there), 0
    for take in range(60):
        match draw.choice(["add", "add", "push", "pull", "cut", "new writer", "new reader"]):
            case "add":
                for _ in range(draw.randrange(1, 8)):
                    add(here, step, take)
                    step += 1
            case "push":
                writer.push()
            case "pull":
                reader.pull()
                metrics_file.read(there)  # whole lines, whatever was cut meanwhile
            case "cut" if step:
                step = draw.randrange(step)
                metrics_file.rewind(here, step)
                # A line that is taken again may be as long as it was: only its name tells the piece from the old one.
            case "new writer":
                writer = MetricsWriter(storage, here)
            case "new reader":
                reader = MetricsReader(storage, there)
    writer.push()
    reader.pull()
    assert (there.read_bytes() if there.exists() else b"") == (here.read_bytes() if here.exists() else b"")
    assert all(size <= 200 for _, size in storage.names())


def test_a_line_that_is_half_written_is_not_brought(pair):
    here, there, storage = pair
    add(here, 0, 0)
    with open(here, "a") as file:
        file.write('{"step": 1, ')
    MetricsWriter(storage, here).push()
    MetricsReader(storage, there).pull()
    assert [record["step"] for record in metrics_file.read(there)] == [0]


def test_nothing_is_written_again_that_is_full(pair):
    here, _, storage = pair
    written = []

    class Noting(Folder):
        def write(self, name, content, *, only_if=None):
            written.append((name, len(content)))
            return super().write(name, content, only_if=only_if)

    writer = MetricsWriter(Noting(storage.path), here)
    for step in range(100):
        add(here, step, 0)
        writer.push()
    assert sum(size for _, size in written) < 4 * here.stat().st_size
    assert b"".join(storage.read(name) for name, _ in storage.names()) == here.read_bytes()


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_write_that_fails_is_done_by_the_next_push(pair, carried_out):
    here, there, storage = pair

    class Failing(Folder):
        left = 3

        def write(self, name, content, *, only_if=None):
            if carried_out:
                super().write(name, content, only_if=only_if)
            if self.left:
                self.left -= 1
                raise StorageError("away")
            return super().write(name, content, only_if=only_if)

    writer = MetricsWriter(Failing(storage.path), here)
    for step in range(30):
        add(here, step, 0)
        if step % 4 == 0:
            try:
                writer.push()
            except StorageError:
                continue
    writer.push()
    MetricsReader(storage, there).pull()
    assert there.read_bytes() == here.read_bytes()


def test_strange_objects_are_none_of_the_pieces(pair):
    here, there, storage = pair
    for name in ("metrics/000000000000.jsonl", "metrics/zzz", "metrics/000000000005-0123abcd.jsonl"):
        storage.write(name, json.dumps({"step": 9}).encode())
    MetricsReader(storage, there).pull()
    assert not there.exists()
    add(here, 0, 0)
    MetricsWriter(storage, here).push()
    assert len(list(storage.names())) == 1, "the writer cleans up"
    MetricsReader(storage, there).pull()
    assert there.read_bytes() == here.read_bytes()
