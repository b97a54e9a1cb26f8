"""Run directories: what may change when a run is taken up again, and that nothing is overwritten by mistake."""

import pytest

from imaml_dist.config.load import build_config
from imaml_dist.errors import CheckpointError, ConfigError, InputError
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


@pytest.mark.parametrize(
    "override",
    ["run.steps=9", "run.workers=7", "run.backend=local", "run.keep=1", "validate.every=3", "tracking.mlflow=false"],
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
        ("run.chunk=8", r"run\.chunk"),
        ("run.threads=2", r"run\.threads"),
        ("run.seed=1", r"run\.seed"),
        ("data.shot=5", r"data\.shot"),
        ("validate.tasks=7", r"validate\.tasks"),
        ("run.reduction=fast", r"run\.reduction"),
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
