"""T tasks as functions of their parameters: what every algorithm is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from imaml_dist.algorithms.loss import Loss
from imaml_dist.core.curvature import GaussNewton, Linearise, Objective, gauss_newton_operator, linearise_hessian
from imaml_dist.models.masks import derived_key
from imaml_dist.models.part import Predictor

Operator = Literal["hessian", "gauss_newton"]
"""Which curvature of the support loss."""


@dataclass(frozen=True)
class Samples:
    """Labelled samples of T tasks: `x` `[T, n, ...]`, `y` `[T, n, ...]`; `key` `[T]` is that of their dropout masks, if any."""

    x: Tensor
    y: Tensor
    key: Tensor | None = None

    def strided(self, begin: int, stride: int) -> Samples:
        """Every `stride`-th sample from `begin` on."""
        key = None if self.key is None else derived_key(self.key, begin)
        return Samples(self.x[:, begin::stride], self.y[:, begin::stride], key)


@dataclass(frozen=True)
class TaskProblem:
    """What T tasks ask of a learner at meta-parameters theta.

    Attributes:
        functional: the model, as a function of the parameters that adapt.
        loss: of outputs and targets.
        anchor: `[T, P]`, theta in every row.
        support: the samples a task adapts to.
        query: the samples an adapted model is judged by; the support samples where there are none.
        own: the algorithm's own learned parameters, by name, without a task axis.
        lap: called with the name of a phase when it ends, for the clock.
        query_outputs: what the last evaluation of `query_loss` predicted, for the record.
    """

    functional: Predictor
    loss: Loss
    anchor: Tensor
    support: Samples
    query: Samples
    own: Mapping[str, Tensor] = field(default_factory=dict)
    lap: Callable[[str], None] = lambda phase: None
    query_outputs: list[Tensor] = field(default_factory=list)

    def support_loss(self, params: Tensor) -> Tensor:
        """`[T, P] -> [T]`."""
        return self.loss_on(self.support)(params)

    def query_loss(self, params: Tensor) -> Tensor:
        """`[T, P] -> [T]`."""
        outputs = self.functional.predict(params, self.query.x, self.query.key)
        self.query_outputs[:] = [outputs.detach()]
        return self.loss(outputs, self.query.y)

    def loss_on(self, samples: Samples) -> Objective:
        """The loss of other samples of the same tasks."""
        return lambda params: self.loss(self.functional.predict(params, samples.x, samples.key), samples.y)

    def linearise(self, operator: Operator) -> Linearise:
        """The support loss at a point, with this curvature of it."""
        if operator == "gauss_newton":
            return lambda at: self.gauss_newton(at).linearised()
        return lambda at: linearise_hessian(self.support_loss, at)

    def gauss_newton(self, at: Tensor) -> GaussNewton:
        """The Gauss-Newton operator of the support loss at parameters `[T, P]`."""
        samples = self.support
        independent = self.functional.samples_independent(samples.x, samples.key)

        def predict_each(params: Tensor) -> Tensor:
            return self.functional.predict(params, samples.x.flatten(0, 1).unsqueeze(1)).squeeze(1)

        return gauss_newton_operator(
            lambda params: self.functional.predict(params, samples.x, samples.key),
            lambda outputs: self.loss(outputs, samples.y),
            at,
            predict_each=predict_each if independent else None,
        )

    def query_accuracy(self) -> Tensor:
        """Fraction of query samples whose largest output is the label, `[T]`, where `query_loss` was evaluated last.

        nan where targets are not class labels.
        """
        (outputs,) = self.query_outputs
        if self.query.y.is_floating_point():
            return outputs.new_full(outputs.shape[:1], torch.nan)
        return (outputs.argmax(-1) == self.query.y).to(outputs.dtype).mean(-1)

    def mini_batches(self) -> list[Objective]:
        """The support samples, then the query samples in batches of about their number: together all samples of a task.

        Where samples are ordered by class, with a multiple of the shots as queries, every batch has the support's balance.
        """
        stride = max(1, self.query.y.shape[1] // max(1, self.support.y.shape[1]))
        return [self.support_loss, *(self.loss_on(self.query.strided(i, stride)) for i in range(stride))]
