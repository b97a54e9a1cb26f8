"""The ledger of trials: what is written is read, however the writer ended."""

import json
import subprocess
import sys

import pytest

from imaml_dist.errors import InputError
from imaml_dist.sweeps.ledger import Ledger, Result

RESULT = Result(accuracy=0.75, ci95=0.01, best_step=40, steps=60, tasks=960, seconds=3.5)


def written(path):
    ledger = Ledger(path)
    ledger.begin(0, {"algorithm.lam": 0.25})
    ledger.begin(1, {"algorithm.lam": 4.0})
    ledger.lose(1)
    ledger.end(0, "finished", RESULT)
    return ledger


def test_what_one_writer_wrote_another_reads(tmp_path):
    before = written(tmp_path / "ledger.jsonl").trials
    after = Ledger(tmp_path / "ledger.jsonl").trials
    assert after == before
    done, running = after
    assert (done.status, done.result, done.values, done.losses) == ("finished", RESULT, {"algorithm.lam": 0.25}, 0)
    assert (running.status, running.losses, running.ended) == ("running", 1, None)


def test_a_crash_at_any_byte_loses_at_most_the_line_that_was_being_written(tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        ledger = Ledger(path)
        assert len(ledger.trials) == min(lines, 2)
        ledger.begin(7, {})
        assert [json.loads(line)["trial"] for line in path.read_text().splitlines()][-1] == 7
        assert len(path.read_text().splitlines()) == lines + 1


@pytest.mark.parametrize(
    "line",
    ["{}", "nonsense", '{"event": "ended", "trial": 5, "time": 1.0}', '{"event": "born", "trial": 0, "time": 1}'],
)
def test_a_line_that_tells_of_no_trial_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    written(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="has a line that tells of no trial"):
        Ledger(path)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin(0, {"x": 1.0})
    ledger.end(0, "finished", Result(accuracy=0.5, ci95=float("nan")))
    assert Ledger(tmp_path / "ledger.jsonl").trial(0).result.ci95 is None


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path):
    """A real limit of the operating system, in a process of its own."""
    path = tmp_path / "ledger.jsonl"
    written(path)
    before = path.read_bytes()
    code = f"""
import resource, signal
from pathlib import Path
from imaml_dist.sweeps.ledger import Ledger, Result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 30}, {len(before) + 30}))
ledger = Ledger(Path({str(path)!r}))
try:
    ledger.end(1, "finished", Result())
except OSError:
    assert ledger.trial(1).status == "running"
else:
    raise SystemExit("nothing was said")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert path.read_bytes() == before
    Ledger(path).end(1, "finished", RESULT)
    assert Ledger(path).trial(1).status == "finished"
