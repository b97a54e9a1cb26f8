"""The Makefile on a fresh clone: from nothing to a finished run, and no second installation."""

import json
import os
import shutil
import subprocess

import pytest
from helpers.command import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_train_on_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(["make", "train"], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((clone / "runs" / "glyphs" / "summary.json").read_text())
    assert summary["seconds"] < 300
    assert summary["test_accuracy"] - summary["ci95"] > summary["untrained_accuracy"] + summary["untrained_ci95"]
    assert summary["test_accuracy"] - summary["untrained_accuracy"] >= 0.10
    assert (clone / "runs" / "glyphs" / "report.html").is_file()
    assert (clone / "runs" / "mlflow.db").is_file()
    again = subprocess.run(["make", "setup"], cwd=clone, env=environment, capture_output=True, text=True, check=True)
    assert "pip install" not in again.stdout
    shutil.rmtree(clone)
