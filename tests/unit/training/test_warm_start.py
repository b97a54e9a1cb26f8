"""Warm start: what is read from where, what is converted, and every refusal in one sentence."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imaml_dist.config.load import build_config
from imaml_dist.errors import CheckpointError, ConfigError
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of
from imaml_dist.training.warm_start import check_outside, load_into


class Net(nn.Module):
    """A body, a head, a layer whose name begins like the head's, and buffers."""

    def __init__(self, seed=0, way=3):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head, self.header = nn.Linear(4, 5), nn.Linear(5, way), nn.Linear(1, 1)
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("mask", torch.full((2,), float(seed)))


def changed(net: Net, **changes) -> dict[str, torch.Tensor]:
    """The network's tensors; `head__weight=None` leaves one out."""
    tensors = {n: v.clone() for n, v in net.state_dict().items()} | {
        n.replace("__", "."): v for n, v in changes.items()
    }
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.fixture
def file(tmp_path):
    def write(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    return write


def test_a_safetensors_file_gives_all_tensors_and_its_hash(file):
    source, net = Net(1), Net(2)
    path = file(source.state_dict())
    digest = load_into(net, path)
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert digest == sha256_of({f"model.{n}": v for n, v in source.state_dict().items()})
    assert load_into(Net(3), f"file://{path}") == digest
    assert load_into(Net(3), file(Net(4).state_dict())) != digest


def test_a_checkpoint_gives_the_model_alone_and_a_run_its_best_one(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.begin(build_config({"name": "t"}))
    for step in (2, 4):
        tensors = {f"model.{n}": v for n, v in Net(step).state_dict().items()}
        tensors |= {"optimizer.0.step": torch.tensor(1.0), "algorithm.lam": torch.tensor(7.0)}
        checkpoints.save(run.checkpoints, step, tensors, {"ledger": {"steps": step}, "best": {"step": 2}})
    for path, step in ((checkpoints.path_of(run.checkpoints, 4), 4), (run.path, 2)):
        net = Net(9)
        load_into(net, str(path))
        assert torch.equal(net.body.weight, Net(step).body.weight)
        assert int(net.count) == step


def test_skipped_tensors_keep_their_values_whatever_the_source_has(file):
    source, fresh, net = Net(1, way=7), Net(2, way=3), Net(2, way=3)
    load_into(net, file(changed(source, extra__weight=torch.ones(1))), ["head", "extra.", "count"])
    assert torch.equal(net.head.weight, fresh.head.weight) and torch.equal(net.head.bias, fresh.head.bias)
    assert int(net.count) == 2
    assert torch.equal(net.body.weight, source.body.weight)
    assert torch.equal(net.header.weight, source.header.weight), "`head` is not the beginning of `header`"
    load_into(net, file(changed(source, head__weight=None, head__bias=None)), ["head"])


@pytest.mark.parametrize("there", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_types_are_converted_to_the_models(file, there):
    source, net = Net(1).to(there), Net(2)
    load_into(net, file(source.state_dict()))
    assert net.body.weight.dtype == torch.float32
    assert torch.equal(net.body.weight, source.body.weight.float())


@pytest.mark.parametrize(
    ("changes", "skip", "error", "says"),
    [
        ({"head__bias": None}, [], CheckpointError, "has no 'head.bias', which this model needs"),
        ({"tail__bias": torch.ones(1)}, [], CheckpointError, "holds 'tail.bias', which this model does not have"),
        ({"head__bias": torch.ones(4)}, [], CheckpointError, r"'head.bias' in shape \(4,\), this model in \(3,\)"),
        ({"head__bias": torch.ones(3).int()}, [], CheckpointError, "'head.bias' in type torch.int32, this model in torch.float32"),
        ({"count": torch.tensor(1.0)}, [], CheckpointError, "'count' in type torch.float32, this model in torch.int64"),
        ({"head__bias": torch.full((3,), torch.nan)}, [], CheckpointError, "numbers in 'head.bias' that are not finite"),
        ({"head__bias": torch.full((3,), 1e300, dtype=torch.float64)}, [], CheckpointError, "not finite in torch.float32"),
        ({}, ["haed"], ConfigError, "warm_start.skip: 'haed' names no tensor; the model's are count, mask, body.weight"),
        ({}, ["body", "head", "header", "count", "mask"], ConfigError, "names all of the model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(file, changes, skip, error, says):
    net = Net(2)
    before = sha256_of(net.state_dict())
    with pytest.raises(error, match=says) as caught:
        load_into(net, file(changed(Net(1), **changes)), skip)
    assert "\n" not in str(caught.value)
    assert sha256_of(net.state_dict()) == before


def test_sources_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "half.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    (tmp_path / "nothing.safetensors").write_bytes(b"")
    run = RunDirectory(tmp_path / "run")
    run.begin(build_config({"name": "t"}))
    path = checkpoints.save(tmp_path / "other", 1, {"model.a": torch.ones(1)}, {"ledger": {"steps": 1}})
    (path / checkpoints.TENSORS).write_bytes(b"damaged")
    for name, error, says in (
        ("nowhere", ConfigError, "there is no .*nowhere; give a run directory, a checkpoint folder or a .safetensors file"),
        ("empty", ConfigError, "is neither a run directory .* nor a checkpoint"),
        ("model.pt", ConfigError, "is not a .safetensors file, and nothing else is read"),
        ("half.safetensors", CheckpointError, "is not a whole safetensors file"),
        ("nothing.safetensors", CheckpointError, "is not a whole safetensors file"),
        ("run", CheckpointError, "has no checkpoint yet"),
        ("other/step-00000001", CheckpointError, "its manifest says"),
    ):  # fmt: skip
        with pytest.raises(error, match=says) as caught:
            load_into(Net(), str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_run_does_not_begin_with_what_lies_in_its_own_directory(tmp_path):
    check_outside(str(tmp_path / "a"), tmp_path / "b")
    for path in (tmp_path / "b", tmp_path / "b" / "checkpoints" / "step-00000002"):
        with pytest.raises(ConfigError, match="lies in the run's own directory"):
            check_outside(str(path), tmp_path / "b")
