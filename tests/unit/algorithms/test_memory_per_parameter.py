"""Tensors alive at once in a meta-gradient, in numbers a parameter: what docs/large-models.md says, whatever the depth or the steps."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from imaml_dist import ANIL, FOMAML, IMAML, ConjugateGradient, EpisodeBatch, GradientDescent, MetaLearner

WIDTH = 250


def network(layers):
    hidden = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, WIDTH), *hidden, nn.Linear(WIDTH, 3))


def episodes(tasks):
    x, y = torch.rand(2, tasks, 3, 16), torch.arange(3).expand(tasks, -1)
    return EpisodeBatch(x[0], y, x[1], y, index=torch.arange(tasks))


def alive(learner, tasks):
    """Most numbers alive at once in a call that is not the first, for each parameter."""
    given = episodes(tasks)
    learner.task_gradients(given[:1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.task_gradients(given)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 4 / learner.functional.layout.size


def imaml(operator, steps=2, cg_steps=2):
    return lambda layers: IMAML(0.1, GradientDescent(0.05, steps), ConjugateGradient(cg_steps, operator=operator))


ALGORITHMS = {
    "Gauss-Newton": (imaml("gauss_newton"), 17),
    "Gauss-Newton, more steps": (imaml("gauss_newton", 6, 6), 17),
    "Hessian": (imaml("hessian"), 16),
    "ANIL": (lambda layers: ANIL(head=[str(2 * layers + 1)], inner=GradientDescent(0.05, 2)), 14),
    "first-order MAML": (lambda layers: FOMAML(inner=GradientDescent(0.05, 2)), 13),
}


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize(("algorithm", "vectors"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_call_needs_what_is_documented(algorithm, vectors, layers):
    for execution, expected in (("loop", lambda tasks: tasks + vectors), ("vmap", lambda tasks: vectors * tasks + 1)):
        learner = MetaLearner(network(layers), algorithm(layers), execution=execution)
        for tasks in (1, 3):
            assert alive(learner, tasks) == pytest.approx(expected(tasks), rel=0.03), (execution, tasks)
