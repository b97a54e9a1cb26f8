"""What `run.precision` means: the types of what is computed, how far results move, and what is refused."""

import pytest
import torch
from helpers.runs import tiny, train_alone

from imaml_dist import IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import resolve
from imaml_dist.errors import ConfigError
from imaml_dist.models.conv4 import Conv4
from imaml_dist.training import checkpoints

WAY = 3


def with_run(**run) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "x", "run": run})


def task_rows(execution, autocast=None, dtype=torch.float32):
    torch.manual_seed(0)
    algorithm = IMAML(0.5, GradientDescent(lr=0.05, steps=3), ConjugateGradient(max_iterations=3))
    model = Conv4((1, 28, 28), WAY, channels=8).to(dtype)
    learner = MetaLearner(model, algorithm, execution=execution, autocast=autocast)
    x = torch.rand(4, 2 * WAY, 1, 28, 28, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.arange(WAY).repeat(4, 2)
    return learner.task_gradients(EpisodeBatch(x, y, x.flip(-1), y, index=torch.arange(4)))


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_bfloat16_rounds_the_factors_and_nothing_else(execution):
    exact, rounded = task_rows("loop", dtype=torch.float64), task_rows(execution, torch.bfloat16)
    single = task_rows(execution)
    assert rounded.rows.dtype == rounded.tasks.cg_residual.dtype == torch.float32

    def error(found):
        return float((found.rows.double() - exact.rows).norm() / exact.rows.norm())

    assert error(single) < 1e-4
    assert 1e-3 < error(rounded) < 0.3  # eight bits of a factor, through three inner steps
    cosine = torch.cosine_similarity(rounded.rows.double().mean(0), exact.rows.mean(0), dim=0)
    assert cosine > 0.9


def test_autocast_ends_with_the_evaluation():
    task_rows("vmap", torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("float64", torch.float64), ("bfloat16", torch.float32)])
def test_a_whole_run_keeps_its_type(data, tmp_path, precision, dtype):
    config = tiny(data, precision=precision, execution="vmap", steps=2)
    train_alone(config, tmp_path / "run")
    tensors, _ = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point() and value.numel() > 1}
    assert kinds == {dtype}


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match=r"run.precision: tf32 given, but only GPUs have it; use"):
        resolve(with_run(precision="tf32"), cuda=False, native=lambda: True)
    assert resolve(with_run(precision="tf32"), cuda=True).run.precision == "tf32"
    with pytest.raises(ConfigError, match=r"run.execution: native given, but its kernels have no bfloat16; use vmap"):
        resolve(with_run(precision="bfloat16", execution="native"), cuda=False, native=lambda: True)
    assert resolve(with_run(precision="bfloat16"), cuda=False, native=lambda: True).run.execution == "vmap"
    with pytest.raises(ValueError, match="not for execution='native'; use 'vmap' or 'loop'"):
        task_rows("native", torch.bfloat16)
