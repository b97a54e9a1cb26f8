"""Checkpoints that are damaged, forged or another run's: none is loaded silently, none is executed, each is a CheckpointError."""

import io
import json
import os
import pickle
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.forgeries import EXECUTABLE, NAMES, cases, edited, pickled, safetensors, sign, tagged, torch_archive
from helpers.runs import tiny, train_alone
from torch import nn

from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import CheckpointError, InputError, StorageError
from imaml_dist.training import checkpoints, warm_start
from imaml_dist.training.checkpoints import FACTS, MANIFEST, TENSORS
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.resumable import fixed_fields
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import MetaState, sha256_of


def new_state(steps=0, config=None):
    torch.manual_seed(steps)
    model = nn.Linear(3, 2)
    state = MetaState(MetaParameters(model), torch.optim.Adam(model.parameters(), lr=0.1), config=config or {})
    for step in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        state.optimizer.step()
        state.ledger.commit(step, [0, 0, 1])
    return state


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 2 and 3; the path of the newer."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 3):
        state = new_state(step)
        path = checkpoints.save(folder, step, state.tensors(), state.facts())
    return path


def refusal(path) -> str:
    """What loading says: one short sentence that can be printed; fails on anything but a CheckpointError."""
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(path)
    said = str(caught.value)
    said.encode()
    assert path.name in said or FACTS in said
    assert len(said) < 1000 + 5 * len(str(path))
    return said


@pytest.mark.parametrize("forge", [pytest.param(forge, id=name) for name, forge in cases()])
def test_what_is_forged_is_refused_and_never_executed(two, tmp_path, forge):
    canary, outside = tmp_path / "canary", tmp_path / "outside"
    outside.mkdir()
    forge(two, canary, outside)
    before = {entry.name: entry.read_bytes() for entry in outside.iterdir()}
    refusal(two)
    told = []
    tensors, _ = checkpoints.load_newest(two.parent, told.append)
    assert sha256_of(tensors) == sha256_of(new_state(2).tensors()), "the one before is taken"
    assert len(told) == 1
    with pytest.raises(InputError):
        warm_start.load_into(nn.Linear(3, 2), str(two))
    checkpoints.set_aside_after(two.parent, 2)
    state = new_state(3)
    checkpoints.save(two.parent, 3, state.tensors(), state.facts())
    assert sha256_of(checkpoints.load(two)[0]) == sha256_of(state.tensors()), "and it is written anew"
    assert {entry.name: entry.read_bytes() for entry in outside.iterdir()} == before, "nothing outside is touched"
    assert not canary.exists()


@pytest.mark.parametrize(
    "run",
    [
        lambda canary: pickle.loads(pickled(canary)),
        lambda canary: pickle.loads(pickled(canary, 0)),
        lambda canary: torch.load(io.BytesIO(torch_archive(canary)), weights_only=False),
        lambda canary: yaml.unsafe_load(tagged(canary)),
        lambda canary: exec(EXECUTABLE["Python"](canary)),
    ],
)
def test_the_traps_would_have_worked(tmp_path, run):
    run(tmp_path / "canary")
    assert (tmp_path / "canary").exists()


def test_other_files_in_the_folder_are_never_opened(two, tmp_path):
    canary, expected = tmp_path / "canary", checkpoints.load(two)
    for name in (".metadata", "state.pt", "__0_0.distcp", "data.pkl", "optimizer.pkl", "__init__.py", "conftest.py"):
        (two / name).write_bytes(EXECUTABLE["Python"](canary) if name.endswith(".py") else pickled(canary))
    os.mkfifo(two / "pipe")
    tensors, facts = checkpoints.load(two)
    assert (sha256_of(tensors), facts) == (sha256_of(expected[0]), expected[1])
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["step-٠٠٠٠٠٠٠٩", "step-00000009 ", "step-000000009", "step-00000009x", "Step-00000009"]
)
def test_folders_with_names_much_like_a_checkpoint_s_are_none(two, name):
    shutil.copytree(two, two.parent / name)
    assert checkpoints.steps(two.parent) == [2, 3]


def test_a_checkpoint_that_is_a_link_is_loaded_and_of_it_only_the_link_is_deleted(two, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(two, elsewhere)
    two.symlink_to(elsewhere)
    checkpoints.load(two)
    state = new_state(4)
    checkpoints.save(two.parent, 4, state.tensors(), state.facts())
    checkpoints.prune(two.parent, keep=1, best=-1)
    assert checkpoints.steps(two.parent) == [4]
    assert sorted(entry.name for entry in elsewhere.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("thing", ["file", "loop", "link to nothing"])
def test_what_is_no_folder_at_all_is_refused_and_makes_way(two, thing):
    shutil.rmtree(two)
    if thing == "file":
        two.write_bytes(b"x")
    else:
        two.symlink_to(two.name if thing == "loop" else "nothing")
    refusal(two)
    told = []
    assert checkpoints.step_of(checkpoints.load_newest(two.parent, told.append)[1]) == 2
    assert len(told) == 1
    (two.parent / "rejected-00000003").write_bytes(b"x")
    checkpoints.set_aside_after(two.parent, 2)
    assert checkpoints.steps(two.parent) == [2]


@contextmanager
def little_memory(more=256 << 20):
    """This process can have so many bytes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", NAMES)
def test_neither_a_long_file_nor_a_large_number_takes_memory(two, name):
    whole = {part: (two / part).read_bytes() for part in NAMES}
    with little_memory():
        for length in (1 << 30, 1 << 40):  # sparse
            os.truncate(two / name, length)
            began = time.monotonic()
            refusal(two)
            assert time.monotonic() - began < 5
            (two / name).write_bytes(whole[name])
        if name != MANIFEST:
            for size in (1 << 40, 1 << 62, 10**30, -1, 1e300):
                edited(two, lambda m, size=size: m["files"][name].update(size=size))
                refusal(two)
                (two / MANIFEST).write_bytes(whole[MANIFEST])
            edited(two, lambda m: m["files"][name].update(size=1 << 40))
            os.truncate(two / name, 1 << 40)
            with pytest.raises(StorageError, match="MemoryError"):
                checkpoints.load(two)


def test_400_flipped_bits_and_100_truncations_load_nothing(two):
    generator = np.random.default_rng(1)
    whole = {name: (two / name).read_bytes() for name in NAMES}
    for case in range(500):
        name = NAMES[case % 3]
        data = bytearray(whole[name])
        if case < 400:
            data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        else:
            del data[int(generator.integers(len(data))) :]
        (two / name).write_bytes(data)
        refusal(two)
        assert checkpoints.step_of(checkpoints.load_newest(two.parent)[1]) == 2
        (two / name).write_bytes(whole[name])
    assert checkpoints.step_of(checkpoints.load(two)[1]) == 3


ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3.0,
    1e300,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
]


def altered(value, generator):
    """JSON with one value, name or element anywhere in it replaced, doubled or left out."""
    if not isinstance(value, (dict, list)) or not value or generator.random() < 0.15:
        return ODD[generator.integers(len(ODD))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, found = keys[generator.integers(len(keys))], value.copy()
    choice = generator.random()
    if choice < 0.1:
        del found[key]
    elif choice < 0.2 and isinstance(value, dict):
        found[str(ODD[generator.integers(len(ODD))])] = found.pop(key)
    elif choice < 0.3 and isinstance(value, list):
        found.append(found[key])
    else:
        found[key] = altered(found[key], generator)
    return found


def scratched(data, generator):
    """Bytes flipped, left out, put in or moved."""
    data = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        place, length = int(generator.integers(len(data) + 1)), int(generator.integers(1, 9))
        match generator.integers(4):
            case 0:
                data[place : place + length] = generator.bytes(length)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = bytes(generator.choice(list(b'0123456789[]{},":-.eE'), length).tolist())
            case 3:
                data[place:place] = data[-length:]
    return bytes(data)


def mutated(name, data, generator):
    """A file of a checkpoint as nobody wrote it, often well formed."""
    if generator.random() < 0.4:
        return scratched(data, generator)
    if name == TENSORS:
        end = 8 + int.from_bytes(data[:8], "little")
        return safetensors(altered(json.loads(data[8:end]), generator), data[end:])
    return json.dumps(altered(json.loads(data), generator), **({"indent": 1} if name == MANIFEST else {})).encode()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_checkpoints_raise_nothing_but_checkpoint_errors(two, count):
    generator = np.random.default_rng(count)
    whole = {name: (two / name).read_bytes() for name in NAMES}
    expected = sha256_of(checkpoints.load(two)[0])
    refused = unsigned = 0
    for case in range(count):
        name = NAMES[case % 3]
        data = mutated(name, whole[name], generator)
        (two / name).write_bytes(data)
        signed = name != MANIFEST and case % 2 == 0
        if signed:
            sign(two)
        unsigned += not signed and data != whole[name]
        try:
            tensors, facts = checkpoints.load(two)
            assert signed or data == whole[name], "silent"
            assert signed or sha256_of(tensors) == expected
            new_state().restore(tensors, facts)
        except CheckpointError as error:
            refused += 1
            str(error).encode()
        for part in NAMES:
            (two / part).write_bytes(whole[part])
    assert unsigned > count // 2
    assert refused >= unsigned


@pytest.mark.parametrize("shape", [(3, 2), (2, 2), (1,), (2, 3, 1)])
def test_slots_of_another_shape_than_the_parameter_s_are_refused(shape):
    state = new_state(2)
    with pytest.raises(CheckpointError, match=r"optimizer\.0\.exp_avg has shape"):
        new_state().restore(state.tensors() | {"optimizer.0.exp_avg": torch.zeros(shape)}, state.facts())


def test_a_checkpoint_of_another_configuration_is_refused_by_the_name_of_the_field():
    state = new_state(2, {"algorithm.lam": 0.1, "run.chunk": 4})
    tensors, facts = state.tensors(), json.loads(json.dumps(state.facts()))
    for field, value in (("algorithm.lam", 0.3), ("run.chunk", 8), ("run.chunk", None)):
        here = new_state(0, state.config | {field: value})
        fresh = sha256_of(here.tensors())
        with pytest.raises(CheckpointError, match=rf"{field}: {value} here, .* written with {state.config[field]}"):
            here.restore(tensors, facts)
        assert sha256_of(here.tensors()) == fresh, "nothing is taken over"
    new_state(0, state.config | {"a.new.field": 1}).restore(tensors, facts)
    new_state(0, state.config).restore(tensors, {**facts, "config": {}})


def test_a_checkpoint_moved_into_another_run_is_refused_there(data, tmp_path):
    train_alone(tiny(data, steps=2), tmp_path / "one")
    other = tiny(data, "algorithm.lam=0.3", steps=4)
    run = RunDirectory(tmp_path / "other")
    run.begin(other)
    shutil.copytree(tmp_path / "one" / "checkpoints", run.checkpoints)
    with pytest.raises(CheckpointError, match=r"algorithm\.lam: 0\.3 here, .* written with 0\.1"):
        Worker(other, run, Alone()).run_to_end()
    assert not run.metrics_file.exists()


def test_what_a_run_may_change_and_names_of_places_are_no_part_of_its_checkpoints(data):
    one = fixed_fields(tiny(data, "warm_start.path=a"))
    assert one == fixed_fields(tiny(data, "run.workers=9", "run.keep=7", "data.url=elsewhere", "warm_start.path=/a"))
    assert one != fixed_fields(tiny(data, "outer.lr=0.5"))
    assert one == json.loads(json.dumps(one))
