"""Checkpoints: what is saved comes back, and nothing damaged is ever loaded."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from imaml_dist.errors import CheckpointError
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.state import MetaState, sha256_of


def _state(steps=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    state = MetaState(MetaParameters(model), torch.optim.Adam(model.parameters(), lr=0.1))
    for step in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        state.optimizer.step()
        state.ledger.commit(step, [0, 0, 1])
    state.seconds = 1.5
    return state


def test_state_comes_back_bit_for_bit_and_goes_on_alike(tmp_path):
    state = _state()
    checkpoints.save(tmp_path, 3, state.tensors(), state.facts())
    other = _state(steps=0, seed=9)
    other.restore(*checkpoints.load_newest(tmp_path))
    assert sha256_of(other.tensors()) == sha256_of(state.tensors())
    assert other.facts() == state.facts()
    assert other.ledger.excluded == [[0, 2, 1], [1, 2, 1], [2, 2, 1]]
    for s in (state, other):
        s.optimizer.zero_grad()
        s.parameters.model(torch.ones(5, 3) * torch.arange(5.0)[:, None]).square().sum().backward()
        s.optimizer.step()
    assert sha256_of(other.tensors()) == sha256_of(state.tensors())


def test_the_hash_sees_every_name_shape_type_and_bit():
    base = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}
    others = [
        {"a": torch.zeros(2, 2), "c": torch.zeros(1)},
        {"a": torch.zeros(4), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 2, dtype=torch.int32), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 2), "b": torch.tensor([-0.0])},
    ]
    assert len({sha256_of(t) for t in [base, *others]}) == 5
    assert sha256_of(base) == sha256_of(dict(reversed(base.items())))


def test_every_flipped_bit_and_truncation_is_noticed_and_the_one_before_is_taken(tmp_path):
    older, newer = _state(steps=2), _state(steps=3)
    checkpoints.save(tmp_path, 2, older.tensors(), older.facts())
    path = checkpoints.save(tmp_path, 3, newer.tensors(), newer.facts())
    generator = np.random.default_rng(0)
    for name in (checkpoints.TENSORS, checkpoints.FACTS, checkpoints.MANIFEST):
        whole = (path / name).read_bytes()
        for case in range(40):
            data = bytearray(whole)
            if case % 4:
                data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
            else:
                del data[int(generator.integers(len(data))) :]
            (path / name).write_bytes(data)
            try:
                checkpoints.load(path)
                readable = json.loads(data) if name == checkpoints.MANIFEST else None
                assert readable == json.loads(whole), "a changed manifest may only pass if it says the same"
            except CheckpointError:
                said = []
                tensors, _ = checkpoints.load_newest(tmp_path, said.append)
                assert sha256_of(tensors) == sha256_of(older.tensors())
                assert len(said) == 1
                assert path.name in said[0]
        (path / name).write_bytes(whole)
    tensors, _ = checkpoints.load_newest(tmp_path)
    assert sha256_of(tensors) == sha256_of(newer.tensors())


def test_when_nothing_verifies_it_says_so_and_when_there_is_nothing_it_returns_none(tmp_path):
    assert checkpoints.load_newest(tmp_path) is None
    state = _state()
    path = checkpoints.save(tmp_path, 3, state.tensors(), state.facts())
    (path / checkpoints.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* verifies"):
        checkpoints.load_newest(tmp_path)


def test_a_half_written_checkpoint_is_none_and_a_damaged_one_is_replaced(tmp_path):
    state = _state()
    leftover = tmp_path / ".step-00000009.123.part"
    leftover.mkdir()
    (leftover / checkpoints.TENSORS).write_bytes(b"half")
    path = checkpoints.save(tmp_path, 3, state.tensors(), state.facts())
    assert checkpoints.steps(tmp_path) == [3]
    (path / checkpoints.TENSORS).write_bytes(b"damaged")
    checkpoints.save(tmp_path, 3, state.tensors(), state.facts())
    assert sha256_of(checkpoints.load(path)[0]) == sha256_of(state.tensors())
    checkpoints.prune(tmp_path, keep=1, best=-1)
    assert not leftover.exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    state = _state()
    for step in range(1, 7):
        checkpoints.save(tmp_path, step, state.tensors(), state.facts())
    checkpoints.prune(tmp_path, keep=2, best=3)
    assert checkpoints.steps(tmp_path) == [3, 5, 6]


def test_checkpoints_beyond_the_one_resumed_from_are_set_aside(tmp_path):
    """Else a damaged later one would count as newest, and pruning would delete what is written next."""
    state = _state()
    for step in (2, 4, 6):
        checkpoints.save(tmp_path, step, state.tensors(), state.facts())
    checkpoints.set_aside_after(tmp_path, 4)
    assert checkpoints.steps(tmp_path) == [2, 4]
    assert (tmp_path / "rejected-00000006" / checkpoints.TENSORS).is_file(), "nothing is lost"


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    state = _state()
    tensors = state.tensors()
    tensors["model.0.weight"] = torch.zeros(4, 5)
    with pytest.raises(CheckpointError, match=r"'0\.weight' has shape \(4, 5\) .*, this model's has shape \(4, 3\)"):
        _state().restore(tensors, state.facts())


def test_ledger_refuses_gaps_and_repetitions():
    ledger = _state().ledger
    for step in (2, 4):
        with pytest.raises(ValueError, match="the next one is 3"):
            ledger.commit(step, [0])


def test_what_a_ledger_told_does_not_change_as_it_goes_on():
    """It is written while the next steps are committed."""
    ledger = _state().ledger
    ledger.commit(3, [0, 1])
    told = ledger.to_dict()
    ledger.commit(4, [1, 1])
    assert told["excluded"][-1] == [3, 1, 1]
    assert told["steps"] == 4
