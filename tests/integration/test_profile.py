"""`imaml train --profile`: what it writes and prints."""

import gzip
import json

from helpers.command import imaml_here
from helpers.runs import fingerprint, tiny, write_config

from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import StorageError
from imaml_dist.training import checkpoints
from imaml_dist.training.profile import PHASES, StepProfile
from imaml_dist.training.run_directory import RunDirectory


def test_a_profiled_run_tells_where_its_time_went_and_computes_the_same(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    long = ("--set", "run.steps=13")
    assert imaml_here("train", str(config), *long, "--run-dir", "plain", cwd=tmp_path)[0] == 0
    code, output = imaml_here("train", str(config), *long, "--run-dir", "run", "--profile", cwd=tmp_path)
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


def test_a_profile_that_cannot_be_written_costs_no_record_checkpoint_or_evaluation(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    run = RunDirectory(tmp_path / "run")
    long = ("--set", "run.steps=14")
    assert imaml_here("train", str(config), "--set", "run.steps=2", "--run-dir", "run", cwd=tmp_path)[0] == 0
    run.evaluation_file.unlink()
    run.profile.write_text("a file where the folder should be")
    code, output = imaml_here("train", str(config), *long, "--run-dir", "run", "--profile", cwd=tmp_path)
    assert code == StorageError.exit_code
    said = " ".join(output.split())
    assert "run/profile cannot be written" in said and "run the same command again to resume" in said
    assert "Traceback" not in output
    assert len(run.metrics_file.read_text().splitlines()) == 14
    assert max(checkpoints.steps(run.checkpoints)) == 14
    assert run.evaluation_file.exists()
    run.profile.unlink()
    code, output = imaml_here("train", str(config), *long, "--run-dir", "run", "--profile", cwd=tmp_path)
    assert code == 0, output


def test_a_profile_is_written_after_all_that_other_ranks_wait_for(data, tmp_path, monkeypatch):
    config, run, then = tiny(data, steps=4, profile=1), RunDirectory(tmp_path / "run"), []
    run.begin(config)

    def write(self, result, ours=StepProfile.write):
        then.extend((len(run.metrics_file.read_text().splitlines()), run.evaluation_file.exists()))
        ours(self, result)

    monkeypatch.setattr(StepProfile, "write", write)
    Worker(config, run, Alone()).run_to_end()
    assert then == [4, True]
    assert run.read_json(run.profile_file)["steps"] == 1


def test_a_run_too_short_to_be_profiled_says_so_and_fresh_ones_delete_a_profile(data, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", data)
    profiled = RunDirectory(tmp_path / "run").profile
    code, output = imaml_here("train", str(config), "--run-dir", "run", "--profile", cwd=tmp_path)
    assert code == 0 and "give it more run.steps" in output
    profiled.mkdir()
    (profiled / "profile.json").write_text("{}")
    assert imaml_here("train", str(config), "--run-dir", "run", "--fresh", cwd=tmp_path)[0] == 0
    assert not profiled.exists()
