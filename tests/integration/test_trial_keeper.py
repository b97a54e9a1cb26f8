"""The keeper of a trial and a real training run: what Tune hears of it is what the run's own metrics say in the end."""

import json
import shutil
import sys

import pytest
import yaml
from helpers.command import ROOT
from helpers.runs import raw_config, tiny, train_alone

from imaml_dist.distributed.ray_trial import TrialCrashedError, TrialKeeper
from imaml_dist.sweeps.search import METRIC, TIME
from imaml_dist.training.run_directory import RunDirectory

STALE = 0.987
"""No accuracy on 12 tasks of 6 images."""


def kept(folder, config, run, **given):
    return {
        "number": 3,
        "run": str(run.path),
        "log": str(folder / "log.txt"),
        "stop": str(folder / "stop"),
        "command": [sys.executable, "-m", "pipelines.trial", "", str(config), str(run.path)],
        "cwd": str(folder),
        "on_ray": False,
        "environment": {"PYTHONPATH": str(ROOT)},
        **given,
    }


def reports(keeper):
    """Until the end: the validations, and how it ended."""
    said = []
    while not (result := keeper.step()).get("done"):
        said.append((result[TIME], result[METRIC]))
    return said, result["outcome"]


def validations(run):
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [(record["step"] + 1, record[METRIC]) for record in records if record.get(METRIC) is not None]


@pytest.fixture
def killed(data, tmp_path):
    """A run that was killed after its last validation and before the checkpoint of it: (its configuration, the run)."""
    run = RunDirectory(tmp_path / "run")
    train_alone(tiny(data, steps=9, checkpoint_every=3), run.path)
    for path in (run.evaluation_file, run.checkpoints / "step-00000009", run.checkpoints / "step-00000006"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = run.metrics_file.read_text().splitlines()
    records = [
        record | ({METRIC: STALE} if record["step"] >= 3 and METRIC in record else {})
        for record in map(json.loads, lines)
    ]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [step for step, accuracy in validations(run) if accuracy == STALE] == [6, 9]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw_config(data, steps=9, checkpoint_every=3)))
    return config, run


def test_what_a_crash_left_beyond_the_checkpoint_is_not_reported(killed, tmp_path):
    config, run = killed
    keeper = TrialKeeper(kept(tmp_path, config, run))
    said, outcome = reports(keeper)
    keeper.stop()
    assert outcome == "finished", (tmp_path / "log.txt").read_text()
    assert [step for step, _ in said] == [3, 6, 9]
    assert said == validations(run) and STALE not in dict(said).values()


def test_a_trial_that_crashes_before_it_resumes_reports_nothing_and_one_that_is_finished_everything(killed, tmp_path):
    config, run = killed
    crashes = TrialKeeper(kept(tmp_path, config, run, command=[sys.executable, "-c", "import os; os._exit(7)"]))
    with pytest.raises(TrialCrashedError, match="exit code 7"):
        crashes.step()
    crashes.stop()
    finished = TrialKeeper(kept(tmp_path, config, run, command=[sys.executable, "-c", "pass"]))
    said, outcome = reports(finished)
    finished.stop()
    assert (said, outcome) == (validations(run), "finished")
