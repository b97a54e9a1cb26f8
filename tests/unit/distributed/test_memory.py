"""Whose memory a new group goes on with, over real gloo groups."""

import pytest
import torch
from helpers.gloo import run_group

from imaml_dist.distributed.group import Alone, ProcessGroup
from imaml_dist.distributed.memory import Memory, newest


def memory(step, value=None):
    tensors = {"x": torch.full((3,), float(step) if value is None else value), "n": torch.tensor(step)}
    return Memory(tensors, {"ledger": {"steps": step}}, {"step": step - 1, "loss": 0.1} if step else None)


CASES = {
    "all but one": (None, memory(3), memory(4)),
    "two alike": (memory(4), None, memory(4)),
    "before the first step": (None, None, memory(0)),
    "nobody": (None, None, None),
    "a contradiction": (memory(4), memory(4, value=1.0), memory(3)),
}
"""What ranks 0, 1 and 2 remember."""


def _newest():
    found = [newest(ProcessGroup(), remembered[ProcessGroup().rank]) for remembered in CASES.values()]
    return [None if f is None else (f.step, f.tensors["x"].tolist(), f.record) for f in found]


@pytest.fixture(scope="module")
def found():
    """By case, of each rank."""
    return dict(zip(CASES, zip(*run_group(3, _newest), strict=True), strict=True))


@pytest.mark.parametrize("case", ["all but one", "two alike"])
def test_the_newest_state_is_taken_over_by_all_with_the_record_of_its_last_step(found, case):
    assert found[case] == ((4, [4.0] * 3, {"step": 3, "loss": 0.1}),) * 3


def test_a_state_of_before_the_first_step_has_no_record(found):
    assert found["before the first step"] == ((0, [0.0] * 3, None),) * 3


@pytest.mark.parametrize("case", ["nobody", "a contradiction"])
def test_nothing_is_taken_over_where_nobody_remembers_or_two_contradict_each_other(found, case):
    assert found[case] == (None,) * 3


def test_alone():
    assert newest(Alone(), None) is None
    assert newest(Alone(), memory(2)).step == 2
