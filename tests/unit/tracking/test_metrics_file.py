"""The metrics file: whole lines only, every step once, also through crashes and rewinds."""

import json

from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.metrics_file import Follower


def test_lines_are_json_even_for_numbers_that_are_not(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics_file.append(path, {"step": 0, "loss": float("nan"), "up": float("inf"), "n": 3})
    assert json.loads(path.read_text()) == {"step": 0, "loss": None, "up": None, "n": 3}


def test_half_a_line_is_no_line(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics_file.append(path, {"step": 0})
    with open(path, "a") as file:
        file.write('{"step": 1')
    assert metrics_file.read(path) == [{"step": 0}]
    metrics_file.rewind(path, 5)
    assert path.read_text() == '{"step": 0}\n'
    assert metrics_file.read(tmp_path / "none.jsonl") == []


def test_a_rewind_leaves_a_file_alone_that_has_nothing_to_drop(tmp_path):
    """Whoever follows it would begin afresh."""
    path = tmp_path / "m.jsonl"
    metrics_file.rewind(path, 0)
    assert not path.exists()
    metrics_file.append(path, {"step": 0, "loss": 0.1, "nan": float("nan")})
    before = path.stat()
    metrics_file.rewind(path, 1)
    assert path.stat() == before


def test_follower_sees_every_step_once_through_partial_writes_and_rewinds(tmp_path):
    path = tmp_path / "m.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    metrics_file.append(path, {"step": 0})
    metrics_file.append(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "a": ')
    assert [r["step"] for r in follower.poll()] == [0, 1]
    with open(path, "a") as file:
        file.write("1}\n")
    assert follower.poll() == [{"step": 2, "a": 1}]
    metrics_file.rewind(path, 1)
    assert follower.poll() == []
    for step in range(1, 5):
        metrics_file.append(path, {"step": step})
    assert [r["step"] for r in follower.poll()] == [3, 4]
    assert follower.poll() == []
