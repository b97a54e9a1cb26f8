"""The model registry: a run's best checkpoint as a version of a registered model, and the alias of the best version.

A version is files and the code that reads them (MLflow's "models from code"): safetensors, YAML and JSON, no pickle, so it loads
with `MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false`. The alias `champion` goes to the version with the highest test accuracy among
those that were tested alike; a tie leaves it where it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaml_dist.tracking.mlflow_link import MlflowLink

CHAMPION, ACCURACY = "champion", "test_accuracy"
SUPPORT_X, SUPPORT_Y, QUERY_X = "support_images", "support_labels", "query_images"
LABELS, LOGITS = "labels", "logits"
INDUCTIVE = "inductive"


@dataclass(frozen=True)
class ModelFacts:
    """A model to be registered.

    Attributes:
        name: of the registered model.
        code: Python file that MLflow runs to load the model (`tracking.pyfunc.serve`).
        files: what that code is given, by name.
        image_shape: `(H, W, C)`.
        way: N, outputs.
        example: an input, by the names of the signature.
        step: of the checkpoint.
        accuracy: on the test tasks, 0..1.
        tested_on: what makes test accuracies comparable, such as the fingerprint of the data set; by name.
        tags: further ones, of the version.
        requirements: for pip.
    """

    name: str
    code: Path
    files: Mapping[str, Path]
    image_shape: tuple[int, int, int]
    way: int
    example: Mapping[str, NDArray[Any]]
    step: int
    accuracy: float
    tested_on: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[str, ...] = ()


def register(link: MlflowLink, facts: ModelFacts) -> str:
    """Make the checkpoint a version of the registered model, once; give it the alias if it is the best.

    May be repeated: a checkpoint that is a version already stays that one.

    Returns:
        A sentence on what became of it.
    """
    from mlflow.exceptions import MlflowException

    client = link.client
    with suppress(MlflowException):  # there is one already; or what is wrong shows below
        client.create_registered_model(facts.name)
    step = str(facts.step)
    versions = client.search_model_versions(f"name='{facts.name}' and run_id='{link.run_id}'")
    version = next((one for one in versions if one.tags.get("step") == step), None)
    if version is None:
        where = f"model-{step}"
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            _save(model, facts)
            link.upload_folder(model, where)
        source = f"{client.get_run(link.run_id).info.artifact_uri}/{where}"
        tags = {**facts.tags, **facts.tested_on, "step": step, ACCURACY: repr(facts.accuracy)}
        version = client.create_model_version(facts.name, source, run_id=link.run_id, tags=tags)
    return f"{facts.name} version {version.version}: {_crown(client, facts, version)}"


def _crown(client: Any, facts: ModelFacts, version: Any) -> str:
    """Move the alias to this version if it is better than the one that has it."""
    from mlflow.exceptions import MlflowException

    try:
        champion = client.get_model_version_by_alias(facts.name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
        client.set_registered_model_alias(facts.name, CHAMPION, str(version.version))
        return f"the first {CHAMPION}"
    if str(champion.version) == str(version.version):
        return f"the {CHAMPION}"
    other = [key for key, value in facts.tested_on.items() if champion.tags.get(key) != value]
    if other:
        return (
            f"not compared with the {CHAMPION}, version {champion.version}, which was tested on another {other[0]}; "
            "register different problems under different names"
        )
    before = float(champion.tags.get(ACCURACY, "nan"))
    if not facts.accuracy > before:
        return f"version {champion.version} stays {CHAMPION} with {before:.2%} against {facts.accuracy:.2%}"
    client.set_registered_model_alias(facts.name, CHAMPION, str(version.version))
    best = max(_comparable(client, facts), key=lambda one: (float(one.tags[ACCURACY]), -int(one.version)))
    if str(best.version) != str(version.version):  # another run registered a better one at the same time
        client.set_registered_model_alias(facts.name, CHAMPION, str(best.version))
        return (
            f"version {best.version} is {CHAMPION} with {float(best.tags[ACCURACY]):.2%} against {facts.accuracy:.2%}"
        )
    return f"the new {CHAMPION} with {facts.accuracy:.2%}, after version {champion.version} with {before:.2%}"


def _comparable(client: Any, facts: ModelFacts) -> list[Any]:
    """All versions that were tested on the same problem, this one included."""
    found = [
        client.get_model_version(facts.name, one.version)
        for one in client.search_model_versions(f"name='{facts.name}'")
    ]
    return [
        one for one in found if ACCURACY in one.tags and all(one.tags.get(k) == v for k, v in facts.tested_on.items())
    ]


def _save(folder: Path, facts: ModelFacts) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    images = (-1, *facts.image_shape)
    signature = ModelSignature(
        inputs=Schema(
            [
                TensorSpec(np.dtype(np.uint8), images, SUPPORT_X),
                TensorSpec(np.dtype(np.int64), (-1,), SUPPORT_Y),
                TensorSpec(np.dtype(np.uint8), images, QUERY_X),
            ]
        ),
        outputs=Schema(
            [
                TensorSpec(np.dtype(np.int64), (-1,), LABELS),
                TensorSpec(np.dtype(np.float32), (-1, facts.way), LOGITS),
            ]
        ),
        params=ParamSchema([ParamSpec(INDUCTIVE, DataType.boolean, False)]),
    )
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(facts.code),
        artifacts={name: str(path) for name, path in facts.files.items()},
        signature=signature,
        input_example=dict(facts.example),
        pip_requirements=list(facts.requirements),
    )
