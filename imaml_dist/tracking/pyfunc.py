"""A registered model as MLflow calls it: support and query images in, labels and logits out. Imported by MLflow alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlflow
import numpy as np

Predictor = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
"""From a mapping of arrays and parameters by the names of the signature to arrays by name."""


class FewShotModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """What `mlflow.pyfunc.load_model` loads.

    Args:
        load: makes the predictor from the paths of the model's files by name.
    """

    def __init__(self, load: Callable[[Mapping[str, str]], Predictor]) -> None:
        self._load = load

    def load_context(self, context: Any) -> None:
        """Called once by MLflow."""
        self._predict = self._load(context.artifacts)

    # What comes is a mapping of arrays; MLflow reads the annotation, and warns whoever loads the model of any that it does not know.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Called by MLflow for each request."""
        return self._predict(model_input, params or {})


def serve(load: Callable[[Mapping[str, str]], Predictor]) -> None:
    """Make this the model of the file that is being run."""
    mlflow.models.set_model(FewShotModel(load))
