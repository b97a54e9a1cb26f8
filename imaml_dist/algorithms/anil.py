"""ANIL: almost no inner loop; only the head adapts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imaml_dist.algorithms.algorithm import NothingOwned
from imaml_dist.algorithms.inner import FirstOrder, GradientDescent
from imaml_dist.algorithms.problem import TaskProblem
from imaml_dist.core.implicit import MetaGradient
from imaml_dist.core.inner.descent import descend
from imaml_dist.core.inner.solution import InnerSolution
from imaml_dist.core.unrolled import unrolled_meta_gradient
from imaml_dist.core.vector import ParameterLayout


@dataclass(frozen=True)
class ANIL(NothingOwned):
    """MAML whose inner loop moves the head alone; the body learns features by the outer loop.

    Attributes:
        inner: the updates that are unrolled.
        head: names, or dotted beginnings of names, of the parameters that adapt; empty is the module of the last parameter.

    Source: Raghu et al. (2020), section 4.
    """

    inner: FirstOrder = field(default_factory=lambda: GradientDescent(lr=0.1, steps=5))
    head: tuple[str, ...] = ()

    def adapt(self, problem: TaskProblem) -> InnerSolution:
        """See `Algorithm.adapt`."""
        moving = self.moving(problem.functional.layout, problem.anchor.device)

        def whole(head: Tensor) -> Tensor:
            return problem.anchor.index_copy(-1, moving, head)

        solution = descend(
            lambda head: problem.support_loss(whole(head)),
            problem.anchor[:, moving],
            self.inner.rule(),
            steps=self.inner.steps,
            tolerance=self.inner.tolerance,
        )
        return replace(solution, params=whole(solution.params))

    def meta_gradient(self, problem: TaskProblem) -> tuple[InnerSolution, MetaGradient]:
        """See `Algorithm.meta_gradient`."""
        return unrolled_meta_gradient(
            problem.support_loss,
            problem.query_loss,
            problem.anchor,
            self.inner.rule(),
            steps=self.inner.steps,
            adapted_entries=self.moving(problem.functional.layout, problem.anchor.device),
        )

    def moving(self, layout: ParameterLayout, device: torch.device) -> Tensor:
        """Places of the head's entries in the flat vector, ascending.

        Raises:
            ValueError: a name of `head` is no parameter and begins none.
        """
        prefixes = self.head or (layout.names[-1].rpartition(".")[0],)
        for prefix in prefixes:
            if not any(_under(name, prefix) for name in layout.names):
                raise ValueError(
                    f"head: {prefix!r} is no parameter and begins none; there are {', '.join(layout.names)}"
                )
        chosen = [
            torch.full((size,), any(_under(name, prefix) for prefix in prefixes))
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        return torch.cat(chosen).nonzero().squeeze(-1).to(device)


def _under(name: str, prefix: str) -> bool:
    return prefix in ("", name) or name.startswith(prefix + ".")
