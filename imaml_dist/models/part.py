"""A model as a function of those parameters that adapt; the others are held where theta has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from imaml_dist.core.vector import ParameterLayout
from imaml_dist.models.functional import FunctionalModel
from imaml_dist.models.head import Head


class Predictor(Protocol):
    """What a task's loss asks of a model: `FunctionalModel`, or a part of one."""

    @property
    def layout(self) -> ParameterLayout:
        """Of the parameters that it is a function of."""
        ...

    @property
    def precision(self) -> float:
        """See `FunctionalModel.precision`."""
        ...

    def predict(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        """See `FunctionalModel.predict`."""
        ...

    def samples_independent(self, x: Tensor, key: Tensor | None = None) -> bool:
        """See `FunctionalModel.samples_independent`."""
        ...


class UnknownParameterError(ValueError):
    """A name stands for no parameter of the model."""


@dataclass(frozen=True)
class HeadAlone:
    """The head of a model, all of whose parameters adapt, as a function of these and of the features that it is given."""

    head: Head

    @property
    def layout(self) -> ParameterLayout:
        """See `Predictor`."""
        return self.head.moving

    @property
    def precision(self) -> float:
        """See `Predictor`."""
        return self.head.functional.precision

    def predict(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Outputs from parameters `[T, E]` and features `[T, n, ...]`."""
        return self.head.evaluate(params, x)

    def samples_independent(self, x: Tensor, key: Tensor | None = None) -> bool:
        """See `Predictor`."""
        return self.head.alone.samples_independent(x)


@dataclass(frozen=True)
class Restricted:
    """A whole model as a function of the parameters at `places`; for those that no head can be cut off with.

    Samples are taken to depend on each other, which costs time in the dual solve alone.
    """

    functional: FunctionalModel
    theta: Tensor
    places: Tensor
    layout: ParameterLayout

    @property
    def precision(self) -> float:
        """See `Predictor`."""
        return self.functional.precision

    def predict(self, params: Tensor, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Outputs from parameters `[T, E]` and samples `[T, n, ...]`."""
        return self.functional.predict(self.theta.index_copy(-1, self.places, params), x, key)

    def samples_independent(self, x: Tensor, key: Tensor | None = None) -> bool:
        """See `Predictor`."""
        return False


def names_under(layout: ParameterLayout, prefixes: Sequence[str], what: str) -> tuple[str, ...]:
    """The parameters with these names or dotted beginnings of names, in the order of the layout.

    Raises:
        UnknownParameterError: one of them is no parameter and begins none; the message calls them `what`.
    """
    for prefix in prefixes:
        if not any(_under(name, prefix) for name in layout.names):
            raise UnknownParameterError(
                f"{what}: {prefix!r} is no parameter and begins none; there are {', '.join(layout.names)}"
            )
    return tuple(name for name in layout.names if any(_under(name, prefix) for prefix in prefixes))


def sublayout(layout: ParameterLayout, names: Sequence[str]) -> ParameterLayout:
    """Of these parameters alone, which are in the layout's order."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return ParameterLayout(tuple(names), tuple(shapes[name] for name in names))


@lru_cache(maxsize=8)
def places_of(layout: ParameterLayout, names: tuple[str, ...], device: torch.device) -> Tensor:
    """Where the entries of these parameters are in the flat vector, ascending."""
    chosen = [torch.full((size,), name in names) for name, size in zip(layout.names, layout.sizes, strict=True)]
    return torch.cat(chosen).nonzero().squeeze(-1).to(device)


def _under(name: str, prefix: str) -> bool:
    return prefix in ("", name) or name.startswith(prefix + ".")
