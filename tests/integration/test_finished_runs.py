"""What may be asked of a run that is finished: to be tested otherwise, to go on, and to be written about."""

import json
import shutil

import pytest
from helpers.command import imaml_here
from helpers.runs import write_config

from imaml_dist.distributed.stop import Stop
from imaml_dist.training.run_directory import RunDirectory
from pipelines import train


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder with a finished run, to be copied by tests that change it."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder / "tiny.yaml", data)
    code, output = imaml_here("train", "tiny.yaml", "--run-dir", "run", cwd=folder)
    assert code == 0, output
    return folder


def test_a_finished_run_is_tested_again_on_other_query_images_and_not_trained_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = RunDirectory(tmp_path / "run")
    before = run.metrics_file.read_bytes()
    code, output = imaml_here("train", "tiny.yaml", "--set", "evaluate.query=2", "--run-dir", "run", cwd=tmp_path)
    assert code == 0 and "is finished" not in output, output
    evaluation, summary = run.read_json(run.evaluation_file), run.read_json(run.summary_file)
    assert (run.config().evaluate.query, evaluation["query"]) == (2, 2)
    assert summary["test_accuracy"] == evaluation["trained"]["mean"]
    assert run.metrics_file.read_bytes() == before


def test_a_finished_run_that_goes_on_is_not_shown_as_finished(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = RunDirectory(tmp_path / "run")

    def while_it_trains(config, run):
        assert imaml_here("report", run.url, cwd=tmp_path)[0] == 0
        return Stop.INTERRUPTED

    monkeypatch.setattr(train, "_train_and_follow", while_it_trains)
    code, _ = imaml_here("train", "tiny.yaml", "--set", "run.steps=9", "--run-dir", "run", cwd=tmp_path)
    page = " ".join(run.report_file.read_text().split())
    assert code == 130 and "6 of 9 meta-steps are recorded" in page and "There is no test accuracy" in page


@pytest.mark.parametrize(
    "words", [("report", "run", "other", "--out"), ("evaluate", "run", "--json"), ("diagnose", "run", "--json")]
)
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("s3://bucket/c.html", "scheme 's3' is not supported"),
        ("s3:/bucket/c.html", "URLs have two slashes"),
        (".", "is a folder"),
        ("missing/c.html", "there is no folder missing"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, words, target, says):
    """There is not even a run here."""
    code, output = imaml_here(*words, target, cwd=tmp_path)
    assert (code, f"{target}" in output, says in output) == (2, True, True), output
    assert len(output.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_results_go_where_a_file_url_says(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "other")
    url = f"file://{tmp_path}"
    code, output = imaml_here("report", "run", str(tmp_path / "other"), "--out", f"{url}/c.html", cwd=finished)
    assert code == 0 and (tmp_path / "c.html").is_file(), output
    code, output = imaml_here("evaluate", "run", "--tasks", "5", "--json", f"{url}/e.json", cwd=finished)
    assert code == 0 and json.loads((tmp_path / "e.json").read_text())["tasks"] == 5, output
    assert not (finished / "file:").exists()
