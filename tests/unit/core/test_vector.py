"""Named tensors to flat vectors and back."""

import pytest
import torch

from imaml_dist.core.vector import ParameterLayout


def test_flattening_and_unflattening_are_inverse_with_and_without_a_task_axis():
    named = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0), "c": torch.arange(4.0)}
    layout = ParameterLayout.of(named)
    assert layout.size == 11
    for batch in ((), (5,)):
        batched = {name: torch.zeros((*batch, *value.shape)) + value + 1 for name, value in named.items()}
        vector = layout.flatten(batched)
        assert vector.shape == (*batch, 11)
        for name, value in layout.unflatten(vector).items():
            torch.testing.assert_close(value, batched[name], rtol=0, atol=0)


def test_the_order_is_that_of_the_names():
    layout = ParameterLayout(("x", "y"), ((1,), (2,)))
    assert layout.flatten({"y": torch.tensor([2.0, 3.0]), "x": torch.tensor([1.0])}).tolist() == [1.0, 2.0, 3.0]


def test_mismatches_are_refused():
    layout = ParameterLayout(("x",), ((2,),))
    with pytest.raises(ValueError, match="do not match"):
        layout.flatten({"z": torch.zeros(2)})
    with pytest.raises(ValueError, match="shape"):
        layout.flatten({"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="entries"):
        layout.unflatten(torch.zeros(3))
