"""A meta-state as bytes, to be sent from one worker to another; no pickle, as in checkpoints."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor


def pack(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """Eight bytes of length, JSON of that length, safetensors."""
    header, body = json.dumps(facts).encode(), serialise(tensors)
    return b"".join((len(header).to_bytes(8, "little"), header, body))


def serialise(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a safetensors file."""
    from safetensors.torch import save

    data: bytes = save(tensors)
    return data


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was packed."""
    from safetensors.torch import load as parse

    end = 8 + int.from_bytes(data[:8], "little")
    facts: dict[str, Any] = json.loads(data[8:end])
    return parse(data[end:]), facts
