"""`imaml train --profile`: what it writes and prints."""

import gzip
import json

from helpers.command import imaml
from helpers.runs import fingerprint, write_config

from imaml_dist.training.profile import PHASES
from imaml_dist.training.run_directory import RunDirectory


def test_a_profiled_run_tells_where_its_time_went_and_computes_the_same(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    long = ("--set", "run.steps=13")
    assert imaml("train", str(config), *long, "--run-dir", "plain", cwd=tmp_path)[0] == 0
    code, output = imaml("train", str(config), *long, "--run-dir", "run", "--profile", cwd=tmp_path)
    assert code == 0, output
    run = RunDirectory(tmp_path / "run")
    found = json.loads(run.profile_file.read_text())
    rows = {row["phase"]: row for row in found["phases"]}
    assert tuple(rows) == (*PHASES, "other")
    assert found["steps"] == 10 and found["peak_gflops"] > 0
    assert abs(sum(row["share"] for row in rows.values()) - 1) < 0.5  # medians of phases do not add up to that of steps
    for phase in ("inner", "query", "solve"):
        assert rows[phase]["gflop"] > 0 and rows[phase]["seconds"] > 0
        assert f"│ {phase}" in output
    trace = json.loads(gzip.decompress((run.profile / "trace.json.gz").read_bytes()))
    assert any("conv" in event.get("name", "") or "mm" in event.get("name", "") for event in trace["traceEvents"])
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "plain")


def test_a_run_too_short_to_be_profiled_says_so_and_fresh_ones_delete_a_profile(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    profiled = RunDirectory(tmp_path / "run").profile
    code, output = imaml("train", str(config), "--run-dir", "run", "--profile", cwd=tmp_path)
    assert code == 0 and "give it more run.steps" in output
    profiled.mkdir()
    (profiled / "profile.json").write_text("{}")
    assert imaml("train", str(config), "--run-dir", "run", "--fresh", cwd=tmp_path)[0] == 0
    assert not profiled.exists()
