"""FLOPs against the count by hand."""

import pytest
import torch
from helpers.kernels import NATIVE
from torch import nn

from imaml_dist import FOMAML, IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner
from imaml_dist.algorithms.flops import flops_by_phase
from imaml_dist.kernels import native

STEPS, SUPPORT, QUERY = 3, 6, 8
PLACES, PATCH, CHANNELS, WAY = 4 * 4, 2 * 9, 5, 3
CONVOLUTION = 2 * PLACES * PATCH * CHANNELS
"""Of one image of 8x8, stride 2."""
HEAD = 2 * PLACES * CHANNELS * WAY


def episodes():
    x, q = torch.rand(2, SUPPORT, 2, 8, 8), torch.rand(2, QUERY, 2, 8, 8)
    return EpisodeBatch(
        x, torch.arange(WAY).repeat(2, 2), q, torch.arange(QUERY).remainder(WAY).repeat(2, 1), torch.arange(2)
    )


def learner(algorithm, execution):
    body = nn.Conv2d(2, CHANNELS, 3, stride=2, padding=1)
    return MetaLearner(
        nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(PLACES * CHANNELS, WAY)), algorithm, execution=execution
    )


@pytest.mark.parametrize("execution", ["loop", pytest.param("native", marks=NATIVE)])
def test_a_gradient_is_counted_as_by_hand(execution):
    subject = learner(FOMAML(inner=GradientDescent(lr=0.1, steps=STEPS)), execution)
    found = flops_by_phase(subject, episodes())
    gradient = 2 * CONVOLUTION + 3 * HEAD  # the images have no gradient
    assert found["inner"] == (STEPS + 1) * SUPPORT * gradient
    assert found["solve"] == QUERY * gradient  # and so the query gradient, where there is nothing to solve


@NATIVE
@pytest.mark.parametrize("operator", ["hessian", "gauss_newton"])
def test_our_kernels_compute_no_more_than_a_product_needs(operator):
    """Of one layer whose input has no derivative: `conv(x, dk)`, and the kernel's derivative with a new cotangent."""
    subject = learner(IMAML(5.0, GradientDescent(lr=0.01, steps=STEPS), ConjugateGradient(operator=operator)), "native")
    problem = subject.problem(episodes(), subject.meta_parameters())
    product = problem.linearise(operator)(problem.anchor).curvature
    before = native.flops()
    product(torch.ones_like(problem.anchor))
    assert native.flops() - before == 2 * CONVOLUTION * SUPPORT * len(episodes())
