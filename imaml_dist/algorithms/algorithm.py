"""What makes an algorithm: how it adapts, what its meta-gradient is, and what it learns besides the model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.vector import ParameterLayout


class Algorithm(Protocol):
    """One interface for all algorithms; a user's own class with these methods works everywhere."""

    @property
    def second_order(self) -> bool:
        """Whether the support loss is differentiated twice."""
        ...

    def own_parameters(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """Initial values, on the CPU, of the parameters the algorithm learns besides the model's; usually none."""
        ...

    @property
    def own_lr(self) -> float | None:
        """Outer learning rate of those parameters; None is the model's."""
        ...

    def describe(self, own: dict[str, Tensor], layout: ParameterLayout) -> dict[str, Tensor]:
        """What to watch of those parameters, in units that mean something: a tensor of values by name."""
        ...

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """Task parameters phi from the support samples, as at meta-test."""
        ...

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """Adapt and differentiate: per-task gradients of the query loss at phi with respect to the meta-parameters."""
        ...


class NothingOwned:
    """For algorithms of second order whose only meta-parameters are the model's."""

    @property
    def second_order(self) -> bool:
        """See `Algorithm.second_order`."""
        return True

    @property
    def own_lr(self) -> float | None:
        """See `Algorithm.own_lr`."""
        return None

    def own_parameters(self, layout: ParameterLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Algorithm.own_parameters`."""
        return {}

    def describe(self, own: dict[str, Tensor], layout: ParameterLayout) -> dict[str, Tensor]:
        """See `Algorithm.describe`."""
        return {}
