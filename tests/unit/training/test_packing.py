"""States as bytes."""

import torch

from imaml_dist.training.packing import pack, unpack


def test_what_is_packed_comes_out_bit_for_bit():
    tensors = {
        "a": torch.tensor([1.0, float("nan"), -0.0]),
        "b.c": torch.arange(6).view(2, 3),
        "none": torch.zeros(0, 3),
    }
    facts = {"step": 3, "text": "Ω", "nan": None}
    found, told = unpack(pack(tensors, facts))
    assert told == facts
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].numpy().tobytes() == value.numpy().tobytes()
