"""The losses, and the user's own that cannot be one: each is refused with what it did and what it should do."""

import pytest
import torch
from helpers.blobs import WAY, Blobs
from helpers.models import OnceOnly
from torch.nn.functional import cross_entropy as torch_cross_entropy

from imaml_dist import FOMAML, IMAML, GradientDescent, MetaLearner, cross_entropy, mean_squared_error
from imaml_dist.algorithms.loss import preflight_loss
from imaml_dist.errors import LossError
from imaml_dist.models.mlp import MLP


def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, generator=generator), torch.randint(4, (3, 6), generator=generator)


def raises(outputs, labels):
    raise ValueError("no\nway")


def nothing(outputs, labels):
    cross_entropy(outputs, labels)


def number(outputs, labels):
    return cross_entropy(outputs, labels).mean().item()


def over_tasks(outputs, labels):
    return cross_entropy(outputs, labels).mean()


def per_sample(outputs, labels):
    return torch_cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)


def detached(outputs, labels):
    return cross_entropy(outputs.detach(), labels)


def centred(outputs, labels):
    return cross_entropy(outputs - outputs.mean(0), labels)


def once(outputs, labels):
    return OnceOnly.apply(outputs).flatten(1).mean(-1)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (raises, r"outputs \(2, 6, 4\) and targets \(2, 6\) cannot be computed \(ValueError: no way\)"),
        (nothing, "has type NoneType, should be a tensor of shape"),
        (number, "has type float, should be a tensor of shape"),
        (over_tasks, r"has shape \(\), should be a tensor of shape \(2,\): the mean over the samples of each task"),
        (per_sample, r"has shape \(2, 6\), should be a tensor of shape \(2,\)"),
        (detached, "does not depend on the outputs"),
        (centred, "the loss of one task depends on the outputs of another"),
        (once, r"cannot be differentiated twice \(.*once_differentiable.*\); a first-order algorithm can use it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_loss_of_each_task_is_refused(loss, says):
    with pytest.raises(LossError, match=says) as caught:
        preflight_loss(loss, *given())
    assert "\n" not in str(caught.value)
    torch.manual_seed(0)
    with pytest.raises(LossError):
        MetaLearner(MLP((1, 1, 4), WAY, [6]).double(), IMAML(0.5), loss).meta_gradient(Blobs().episodes(0, range(2)))


def test_a_loss_differentiable_once_serves_first_order_algorithms():
    preflight_loss(once, *given(), twice=False)
    torch.manual_seed(0)
    subject = MetaLearner(MLP((1, 1, 4), WAY, [6]).double(), FOMAML(GradientDescent(0.1, 2)), once)
    assert subject.meta_gradient(Blobs().episodes(0, range(2))).tasks.outcome.tolist() == [0, 0]


def test_running_out_of_memory_is_no_fault_of_the_loss():
    def greedy(outputs, labels):
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError):
        preflight_loss(greedy, *given())


def test_the_losses_are_means_over_the_samples_of_each_task():
    logits, labels = given()
    preflight_loss(cross_entropy, logits, labels)
    expected = torch.stack([torch_cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    targets = logits.flip(1)
    preflight_loss(mean_squared_error, logits, targets)
    expected = torch.stack([((z - y) ** 2).mean() for z, y in zip(logits, targets, strict=True)])
    torch.testing.assert_close(mean_squared_error(logits, targets), expected)
    with pytest.raises(ValueError, match="must have one shape"):
        mean_squared_error(logits, targets[..., :1])
