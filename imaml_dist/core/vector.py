"""Named tensors <-> one flat vector per task.

The mathematics of this package works on `[T, P]` matrices: row t holds all P parameters of task t. A model has
named tensors. `ParameterLayout` is the fixed map between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, cat, split


@dataclass(frozen=True)
class ParameterLayout:
    """Order, names and shapes of a model's parameters in a flat vector.

    Args:
        names: parameter names in the order of the flat vector.
        shapes: one shape per name, without the task axis.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> ParameterLayout:
        """Layout of `parameters`, in their own order."""
        return ParameterLayout(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Concatenate named tensors `[*batch, *shape]` into one `[*batch, P]` tensor.

        Args:
            parameters: a tensor for each name of the layout, all with the same leading batch axes (or none).

        Returns:
            Tensor `[*batch, P]`.

        Raises:
            ValueError: a name is missing or unknown, or a shape does not end in the layout's.
        """
        if set(parameters) != set(self.names):
            raise ValueError(f"parameters {sorted(parameters)} do not match the layout {sorted(self.names)}")
        rows = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            value = parameters[name]
            batch = value.shape[: value.dim() - len(shape)]
            if tuple(value.shape[len(batch) :]) != shape:
                raise ValueError(f"parameter {name!r} has shape {tuple(value.shape)}, expected [..., *{shape}]")
            rows.append(value.reshape((*batch, size)))
        return cat(rows, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a `[*batch, P]` tensor under the parameters' names, each `[*batch, *shape]`.

        Raises:
            ValueError: the last axis is not P long.
        """
        if vector.shape[-1] != self.size:
            raise ValueError(f"vector has {vector.shape[-1]} entries, the layout has {self.size}")
        parts = split(vector, list(self.sizes), dim=-1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }
