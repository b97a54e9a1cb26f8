"""Checksums see every bit and not the order of computing; who is at fault follows from courses."""

import pytest
import torch

from imaml_dist.distributed import agreement
from imaml_dist.distributed.agreement import Course, checksum, first_to_leave, minority


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(5, 3, generator=generator),
        torch.randn(7, generator=generator, dtype=torch.float64),
        torch.tensor(3.0),
        torch.randn(4, generator=generator).bfloat16(),
        torch.tensor([1, 2, 3]),
        torch.tensor([True, False]),
    ]


def in_plain_integers(found):
    """The formula, number by number."""
    total, index = 0, 0
    for tensor in found:
        size = tensor.element_size()
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for begin in range(0, len(data), size):
            bits = int.from_bytes(data[begin : begin + size], "little", signed=size > 1)
            total += (2 * index + 1) * bits
            index += 1
    return total % 2**64


@pytest.mark.parametrize("at_once", [1 << 20, 4, 1])
def test_it_is_the_formula_in_parts_of_any_size(monkeypatch, at_once):
    monkeypatch.setattr(agreement, "AT_ONCE", {"cpu": at_once})
    agreement._weights.cache_clear()
    assert checksum(tensors()) == in_plain_integers(tensors())
    agreement._weights.cache_clear()


def test_every_flipped_bit_and_every_exchange_of_two_numbers_is_seen():
    whole = checksum(tensors())
    for number, tensor in enumerate(tensors()):
        for bit in range(8 * tensor.numel() * tensor.element_size() if tensor.dtype != torch.bool else 0):
            changed = tensors()
            data = changed[number].reshape(-1).view(torch.uint8)
            data[bit // 8] ^= 1 << bit % 8
            assert checksum(changed) != whole
    exchanged = tensors()
    exchanged[0][0, 0], exchanged[0][4, 2] = exchanged[0][4, 2].clone(), exchanged[0][0, 0].clone()
    assert checksum(exchanged) != whole


def test_nothing_and_negative_zero():
    assert checksum([]) == 0
    assert checksum([torch.zeros(3)]) != checksum([-torch.zeros(3)])


def test_the_first_step_in_which_a_course_leaves_the_right_one():
    right = Course(6, [1, 2, 3, 4])
    assert Course(6, [1, 2, 3, 4]).left_at(right) is None
    assert Course(6, [1, 2, 9, 8]).left_at(right) == 8
    assert Course(6, [9, 2, 3, 4]).left_at(right) == 6
    assert Course(6, [1, 2, 9, 4]).fold() != right.fold(), "a course that has come back is another one"


def test_most_ranks_are_right_and_half_of_them_are_not_most():
    assert minority([5, 5, 5]) == []
    assert minority([5, 7, 5]) == [1]
    assert minority([5, 7, 5, 8, 5]) == [1, 3]
    assert minority([5, 7]) is None
    assert minority([5, 5, 7, 7]) is None


def test_who_left_first_is_at_fault_and_all_at_once_are_nobody_in_particular():
    assert first_to_leave([None, None]) == []
    assert first_to_leave([9, 8]) == [1]
    assert first_to_leave([None, 8, 9]) == [1]
    assert first_to_leave([8, 8]) == [0, 1]
