"""Run directories: what may change when a run is taken up again, and that nothing is overwritten by mistake."""

import pytest
import torch

from imaml_dist.config.load import build_config
from imaml_dist.errors import CheckpointError, ConfigError, InputError, StorageError
from imaml_dist.training import checkpoints, run_directory
from imaml_dist.training.run_directory import RunDirectory


def config(*overrides):
    return build_config({"name": "t"}, overrides)


def test_an_identical_run_goes_on_and_stale_requests_are_forgotten(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.begin(config())
    run.request_stop()
    run.write_json(run.failure_file, {})
    run.metrics_file.write_text("kept")
    run.begin(config())
    assert run.config() == config()
    assert run.metrics_file.read_text() == "kept"
    assert not run.stop_file.exists()
    assert not run.failure_file.exists()


def test_a_run_that_goes_on_has_no_results_and_keeps_all_else(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.begin(config())
    results = (run.summary_file, run.evaluation_file, run.report_file)
    for file in (*results, run.metrics_file, run.starts_file, run.mlflow_file):
        file.write_text("{}")
    run.withdraw_results()
    run.withdraw_results()
    assert not any(file.exists() for file in results)
    assert all(file.exists() for file in (run.config_file, run.metrics_file, run.starts_file, run.mlflow_file))


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=9",
        "run.workers=7",
        "run.backend=local",
        "run.keep=1",
        "run.give_up_after=3",
        "validate.every=3",
        "tracking.mlflow=false",
    ],
)
def test_what_does_not_change_a_meta_step_may_change(tmp_path, override):
    run = RunDirectory(tmp_path / "r")
    run.begin(config())
    run.begin(config(override))
    assert run.config() == config(override)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("algorithm.lam=0.3", r"algorithm\.lam: 0\.3 given, .* begun with 0\.1"),
        ("algorithm.kind=anil", r"algorithm\.kind: 'anil' given, .* begun with 'imaml'"),
        ("run.chunk=8", r"run\.chunk"),
        ("run.threads=2", r"run\.threads"),
        ("run.seed=1", r"run\.seed"),
        ("data.shot=5", r"data\.shot"),
        ("validate.tasks=7", r"validate\.tasks"),
        ("run.reduction=fast", r"run\.reduction"),
        ("outer.beta1=0.8", r"outer\.beta1"),
        ("warm_start.path=x", r"warm_start\.path: 'x' given, .* begun with None"),
    ],
)
def test_anything_else_is_refused_by_name_and_changes_nothing(tmp_path, override, field):
    run = RunDirectory(tmp_path / "r")
    run.begin(config())
    with pytest.raises(ConfigError, match=field):
        run.begin(config(override))
    assert run.config() == config()
    run.metrics_file.write_text("old")
    run.begin(config(override), fresh=True)
    assert run.config() == config(override)
    assert not run.metrics_file.exists()


def test_fresh_does_not_clear_what_is_still_written_to(tmp_path, monkeypatch):
    """What a worker elsewhere wrote afterwards would be taken for the new run's."""
    monkeypatch.setattr(run_directory, "WRITER_WAIT_S", 0.1)
    hasty = config("run.collective_timeout=1")
    run = RunDirectory(tmp_path / "r")
    run.begin(hasty, fresh=True)
    run.metrics_file.write_text("old")
    with run.writing(0), pytest.raises(StorageError, match="still written to by workers of an earlier start"):
        run.begin(hasty, fresh=True)
    assert run.metrics_file.read_text() == "old"
    run.begin(hasty, fresh=True)
    assert not run.metrics_file.exists()


def test_more_steps_are_refused_where_the_rate_depends_on_their_number(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.begin(config("outer.schedule=cosine"))
    with pytest.raises(
        ConfigError, match=r"run\.steps: 9 given, .* begun with 2000, and with outer\.schedule 'cosine'"
    ):
        run.begin(config("outer.schedule=cosine", "run.steps=9"))


def test_a_lost_best_checkpoint_falls_back_to_the_newest(tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.begin(config())
    for step, best in ((2, 2), (4, 2)):
        facts = {"ledger": {"steps": step}, "best": {"step": best}}
        checkpoints.save(run.checkpoints, step, {"model.w": torch.zeros(1)}, facts)
    assert run.best_checkpoint() == 2
    (checkpoints.path_of(run.checkpoints, 2) / checkpoints.TENSORS).write_bytes(b"damaged")
    assert run.best_checkpoint() == 4


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert run.read_json(tmp_path / "x.json") == {"a": [None, 1.5], "b": {"c": None}}


def test_folders_that_are_no_run_are_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    for fresh in (False, True):
        with pytest.raises(InputError, match="holds no run"):
            RunDirectory(tmp_path).begin(config(), fresh=fresh)
    assert (tmp_path / "precious.txt").read_text() == "x"
    with pytest.raises(InputError, match=r"no config\.yaml"):
        RunDirectory(tmp_path).config()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        RunDirectory(tmp_path).best_checkpoint()
