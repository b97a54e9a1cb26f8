"""Batches of episodes: what fits together, and the refusal of what does not."""

import dataclasses

import pytest
import torch

from imaml_dist.errors import InputError
from imaml_dist.tasks.episode import EpisodeBatch


def batch(tasks=3, support=4, query=6, width=5, **changes):
    index = torch.arange(tasks)
    tensors = {
        "support_x": torch.arange(tasks * support * width).reshape(tasks, support, width).float(),
        "support_y": torch.arange(support).repeat(tasks, 1) + 10 * index[:, None],
        "query_x": torch.zeros(tasks, query, width),
        "query_y": torch.zeros(tasks, query, dtype=torch.int64),
        "index": index,
        "key": index + 7,
    }
    return EpisodeBatch(**tensors | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"support_x": torch.zeros(2, 4, 5)},
        {"support_y": torch.zeros(2, 4, dtype=torch.int64)},
        {"query_x": torch.zeros(4, 6, 5)},
        {"query_y": torch.zeros(1, 6, dtype=torch.int64)},
        {"index": torch.arange(2)},
        {"index": torch.tensor(0)},
        {"index": torch.arange(3)[:, None]},
        {"key": torch.arange(2)},
        {"support_y": torch.zeros(3, 5, dtype=torch.int64)},
        {"query_y": torch.zeros(3, 1, dtype=torch.int64)},
        {"query_x": torch.zeros(3, 7, 5)},
        {"support_x": torch.zeros(3), "support_y": torch.zeros(3)},
    ],
    ids=lambda changes: "-".join(f"{name}{tuple(value.shape)}" for name, value in changes.items()),
)
def test_what_does_not_belong_together_is_refused_in_one_sentence(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(
        InputError, match="each needs one row per task, support_x and support_y one entry per sample"
    ) as caught:
        batch(**changes)
    assert "\n" not in str(caught.value)
    assert f"{name} {tuple(value.shape)}" in str(caught.value)


def test_what_fits_is_taken_also_without_a_task_with_targets_of_any_shape_and_as_a_slice():
    assert len(batch(0)) == 0 and len(batch()[1:]) == 2 and len(batch()[5:]) == 0
    regression = batch(support_y=torch.zeros(3, 4, 2), query_y=torch.zeros(3, 6, 2))
    assert len(regression.chosen(torch.tensor([True, False, True]))) == 2
    with pytest.raises(InputError):
        dataclasses.replace(regression, query_y=torch.zeros(3, 5, 2))


def test_stacked_batches_are_one_after_the_other():
    first, second = batch(2), batch(3)
    found = EpisodeBatch.stack([first, second])
    assert len(found) == 5
    for field in dataclasses.fields(found):
        parts = [getattr(part, field.name) for part in (first, second)]
        assert torch.equal(getattr(found, field.name), torch.cat(parts))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"support": 3},
            r"episode 1 has support_x of shape \(3, 5\) per task, episode 0 \(4, 5\); .* a list of batches",
        ),
        ({"query": 5}, r"episode 1 has query_x of shape \(5, 5\) per task, episode 0 \(6, 5\)"),
        ({"width": 2}, r"episode 1 has support_x of shape \(4, 2\) per task"),
        ({"query_y": torch.zeros(3, 6, 2)}, r"episode 1 has query_y of shape \(6, 2\) per task, episode 0 \(6,\)"),
    ],
)
def test_ragged_episodes_are_not_stacked(other, says):
    with pytest.raises(InputError, match=says) as caught:
        EpisodeBatch.stack([batch(), batch(**other)])
    assert "\n" not in str(caught.value)


def test_nothing_is_not_stacked():
    with pytest.raises(InputError, match="no episodes to stack; give at least one"):
        EpisodeBatch.stack([])
