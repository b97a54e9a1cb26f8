"""Checkpoints that nobody should load: payloads that would run, tensor files that lie, ledgers, links and manifests."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import torch
from safetensors.torch import save as serialise

from imaml_dist.training.checkpoints import FACTS, MANIFEST, TENSORS

NAMES = (TENSORS, FACTS, MANIFEST)


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
