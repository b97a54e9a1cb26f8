"""Checkpoints that are damaged, forged or another run's: none is loaded silently, none is executed, each is a CheckpointError."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import tiny, train_alone
from safetensors.torch import save as serialise
from torch import nn

from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.worker import Worker
from imaml_dist.errors import CheckpointError, InputError, StorageError
from imaml_dist.training import checkpoints, warm_start
from imaml_dist.training.checkpoints import FACTS, MANIFEST, TENSORS
from imaml_dist.training.meta_parameters import MetaParameters
from imaml_dist.training.run_directory import RunDirectory, fixed_fields
from imaml_dist.training.state import MetaState, sha256_of

NAMES = (TENSORS, FACTS, MANIFEST)


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


def sign(path):
    """Write the manifest that fits the files as they are: a forger can do that."""
    files = {}
    for name in (TENSORS, FACTS):
        data = (path / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest = {"format": "imaml-checkpoint", "version": 1, "step": 3, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def safetensors(header, body=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# What would leave a canary behind if anything executed it.


class Trap:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def pickled(canary, protocol=2):
    return pickle.dumps(Trap(canary), protocol)


def torch_archive(canary):
    buffer = io.BytesIO()
    torch.save({"model.weight": torch.zeros(2), "trap": Trap(canary)}, buffer)
    return buffer.getvalue()


def zipped(canary):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"../../../../../{canary}", "x")
        archive.writestr("data.pkl", pickled(canary))
    return buffer.getvalue()


def tagged(canary):
    return f"!!python/object/apply:os.mkdir ['{canary}']".encode()


EXECUTABLE = {
    "pickle": pickled,
    "pickle of protocol 0": lambda canary: pickled(canary, 0),
    "torch archive": torch_archive,
    "zip": zipped,
    "YAML tag": tagged,
    "YAML tag in JSON": lambda canary: json.dumps({"ledger": tagged(canary).decode()}).encode(),
    "shell": lambda canary: f"#!/bin/sh\nmkdir {canary}\n".encode(),
    "Python": lambda canary: f"import os\nos.mkdir({str(canary)!r})\n".encode(),
}

WHOLE = serialise({"model.weight": torch.zeros(2, 3), "model.bias": torch.zeros(2)})
DEEP = b"[" * 100_000
HEADERS = {
    **{f"length {n}": safetensors({}, length=n) for n in (3, 10**8, 2**31, 2**63, 2**64 - 1)},
    "nothing": b"",
    "half a length": WHOLE[:5],
    "no body": safetensors({"a": tensor()}),
    "offset beyond the end": safetensors({"a": tensor(offsets=(0, 2**62))}, b"1234"),
    "offset beyond 64 bits": safetensors({"a": tensor(offsets=(0, 2**70))}, b"1234"),
    "offsets reversed": safetensors({"a": tensor(offsets=(4, 0))}, b"1234"),
    "offset negative": safetensors({"a": tensor(offsets=(-4, 0))}, b"1234"),
    "overlap": safetensors({"a": tensor(), "b": tensor()}, b"1234"),
    "a hole": safetensors({"a": tensor(offsets=(4, 8))}, b"12345678"),
    "more than it says": safetensors({"a": tensor()}, b"12345678"),
    "shape too large": safetensors({"a": tensor(shape=(2**40, 2**40))}, b"1234"),
    "shape beyond 64 bits": safetensors({"a": tensor(shape=(2**64,))}, b"1234"),
    "shape beyond torch": safetensors({"a": tensor(shape=(0, 2**63), offsets=(0, 0))}),
    "stride beyond torch": safetensors({"a": tensor(shape=(0, 2**40, 2**40), offsets=(0, 0))}),
    "shape negative": safetensors({"a": tensor(shape=(-1,))}, b"1234"),
    "shape no number": safetensors({"a": tensor(shape=("x",))}, b"1234"),
    **{
        f"type {d!r}": safetensors({"a": tensor(d, (2,), (0, 1))}, b"1")
        for d in ("F4", "F32", "F1000", "O", "object", "", None, 3, ["F32"])
    },
    "type torch may not know": safetensors({"a": tensor("F6_E2M3", (4,), (0, 3))}, b"123"),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "a list": safetensors([]),
    "not a number": safetensors(b'{"a":NaN}'),
    "half a surrogate": safetensors(b'{"\\ud800":' + json.dumps(tensor()).encode() + b"}", b"1234"),
    "deep": safetensors(DEEP),
    "UTF-16": safetensors(json.dumps({"a": tensor()}).encode("utf-16"), b"1234"),
}
"""Tensor files that no one should load, whatever signs them."""

LEDGERS = {
    "deep": DEEP,
    "deep in a field": b'{"ledger":' + DEEP,
    "huge whole number": b'{"ledger":{"steps":' + b"9" * 5000 + b"}}",
    "large whole number": b'{"ledger":{"steps":' + b"9" * 4000 + b"}}",
    "infinite": b'{"ledger":{"steps":1e999}}',
    "not a number": b'{"ledger":{"steps":NaN}}',
    "text": b'{"ledger":{"steps":"3"}}',
    "true": b'{"ledger":{"steps":true}}',
    "a fraction": b'{"ledger":{"steps":3.0}}',
    "another step": b'{"ledger":{"steps":4}}',
    "before the first": b'{"ledger":{"steps":-3}}',
    "no ledger": b"{}",
    "a list": b"[]",
    "a list of a list": b'{"ledger":[3]}',
    "null": b"null",
    "not UTF-8": b'{"ledger":{"steps":3,"\xff":1}}',
    "nothing": b"",
}


def edited(path, change):
    """The manifest with something else in it."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def traversing(name):
    def forge(path, outside):
        """A file outside is given as one of the checkpoint's; what it would be verified by is right."""
        secret = outside / "secret"
        edited(path, lambda m: m["files"].update({name.format(outside=outside): m["files"].pop(TENSORS)}))
        shutil.copy(path / TENSORS, secret)

    return forge


def linked(name):
    def forge(path, outside):
        shutil.move(path / name, outside / name)
        (path / name).symlink_to(outside / name)

    return forge


def replaced_by_link(target):
    def forge(path, outside):
        (path / TENSORS).unlink()
        (path / TENSORS).symlink_to(target)

    return forge


def piped(path, outside):
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def foldered(path, outside):
    (path / FACTS).unlink()
    (path / FACTS).mkdir()


def rewritten(change):
    def forge(path, outside):
        (path / MANIFEST).write_bytes(change((path / MANIFEST).read_bytes()))

    return forge


PLACES = {
    **{f"link as {name}": linked(name) for name in NAMES},
    **{f"link to {target}": replaced_by_link(target) for target in ("/dev/zero", "/etc/passwd", TENSORS, "/no/such")},
    "a pipe": piped,
    "a folder": foldered,
    **{
        f"manifest names {name}": traversing(name)
        for name in ("../../../outside/secret", "{outside}/secret", "./state.safetensors", "state.safetensors\0")
    },
    "manifest names one file more": lambda path, outside: edited(
        path, lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "size": 0}})
    ),
    "manifest of another format": lambda path, outside: edited(path, lambda m: m.update(format="\ud800" * 9999)),
    "manifest of another version": lambda path, outside: edited(path, lambda m: m.update(version=10**999)),
    "manifest of another step": lambda path, outside: edited(path, lambda m: m.update(step=2)),
    "manifest with version true": lambda path, outside: edited(path, lambda m: m.update(version=True)),
    "manifest with a fraction": lambda path, outside: edited(path, lambda m: m.update(step=3.0)),
    "manifest with a field more": lambda path, outside: edited(path, lambda m: m.update(pickle="x")),
    "manifest with a size of text": lambda path, outside: edited(
        path, lambda m: m["files"][TENSORS].update(size="\ud800" * 9999)
    ),
    "manifest with a sum of text": lambda path, outside: edited(
        path, lambda m: m["files"][TENSORS].update(sha256="\ud800\x1b" * 9999)
    ),
    "manifest with a huge number": rewritten(lambda data: data.replace(b'"step": 3', b'"step": ' + b"3" * 5000)),
    "manifest with a field twice": rewritten(lambda data: b'{"step": 9,' + data[1:]),
    "manifest in UTF-16": rewritten(lambda data: data.decode().encode("utf-16")),
    "manifest with a mark": rewritten(lambda data: b"\xef\xbb\xbf" + data),
    "manifest with more behind it": rewritten(lambda data: data + b"\n"),
    "manifest too long": rewritten(lambda data: data + b" " * 70_000),
    "manifest deep": rewritten(lambda data: DEEP[:60_000]),
}
"""Links, pipes, folders and manifests: each is given the checkpoint and a folder outside of the run."""


def cases():
    """(name, what makes a whole checkpoint that one, given its path, the canary and a folder outside)."""

    def content(name, make, signed):
        def forge(path, canary, outside):
            (path / name).write_bytes(make(canary))
            if signed and name != MANIFEST:
                sign(path)

        return forge

    for kind, make in EXECUTABLE.items():
        for name in NAMES:
            yield f"{kind} as {name}", content(name, make, signed=True)
        yield f"{kind} as {TENSORS}, not signed", content(TENSORS, make, signed=False)
    for kind, data in HEADERS.items():
        yield f"tensors: {kind}", content(TENSORS, lambda canary, data=data: data, signed=True)
    for kind, data in LEDGERS.items():
        yield f"facts: {kind}", content(FACTS, lambda canary, data=data: data, signed=True)
    for kind, forge in PLACES.items():
        yield kind, lambda path, canary, outside, forge=forge: forge(path, outside)


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
