"""A trained checkpoint as a function: support images with labels and query images in, labels and logits out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml_dist.algorithms.learner import OWN, MetaLearner
from imaml_dist.config.load import load_config
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.build import dtype_of, make_learner, prepare_process
from imaml_dist.errors import InputError
from imaml_dist.kernels import native
from imaml_dist.tracking.mlflow_model import INDUCTIVE, LABELS, LOGITS, QUERY_X, SUPPORT_X, SUPPORT_Y
from imaml_dist.training import checkpoints
from imaml_dist.training.meta_parameters import MODEL, meta_parameters
from imaml_dist.training.packing import serialise
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import updates_of

CODE = Path(__file__).with_name("served.py")
"""What MLflow runs to load a model."""

CONFIG, TENSORS, FACTS = "config", "tensors", "facts"
"""Names of the files of a model."""


def write_files(run: RunDirectory, step: int, image_shape: tuple[int, int, int], folder: Path) -> dict[str, Path]:
    """Write what `load` needs of a checkpoint of a run; without the optimiser.

    Args:
        run: a training run.
        step: of the checkpoint.
        image_shape: `(C, H, W)`.
        folder: to write to.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    tensors, facts = run.load_checkpoint(step)
    learned = {name: value for name, value in tensors.items() if name.startswith((MODEL, OWN))}
    files = {CONFIG: "config.yaml", TENSORS: "model.safetensors", FACTS: "facts.json"}
    paths = {name: folder / file for name, file in files.items()}
    paths[CONFIG].write_bytes(run.config_file.read_bytes())
    paths[TENSORS].write_bytes(serialise(learned))
    paths[FACTS].write_text(json.dumps({"image_shape": image_shape, "updates": updates_of(facts)}))
    return paths


def load(files: Mapping[str, str]) -> Adapted:
    """The model behind such files, on this machine's kind of device and kernels.

    Raises:
        InputError: a file is not what it should be.
    """
    config = load_config(Path(files[CONFIG]))
    here: dict[str, Any] = {}
    if config.run.device == "cuda" and not torch.cuda.is_available():
        here["device"] = "cpu"
    if config.run.execution == "native" and not native.usable():
        here["execution"] = "vmap"
    config = config.model_copy(update={"run": config.run.model_copy(update=here)})
    prepare_process(config)
    facts = json.loads(Path(files[FACTS]).read_bytes())
    learner = make_learner(config, tuple(facts["image_shape"]), facts["updates"])
    meta_parameters(learner).load(checkpoints.parse_tensors(Path(files[TENSORS]).read_bytes()))
    return Adapted(config, learner)


class Adapted:
    """Adapts to what it is given, each time anew.

    Args:
        config: of the run.
        learner: with the checkpoint's meta-parameters.
    """

    def __init__(self, config: ExperimentConfig, learner: MetaLearner) -> None:
        self._config, self._learner = config, learner

    def __call__(self, given: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        """Adapt to the support images, and name the query images.

        Args:
            given: `support_images` uint8 `[n, H, W, C]`, `support_labels` `[n]` in 0 .. N - 1, `query_images` uint8
                `[m, H, W, C]`: as arrays.
            params: `inductive`: each query image alone, with statistics from the support images; else all together, as
                `learner.adapt` does.

        Returns:
            `labels` int64 `[m]` and `logits` float32 `[m, N]`, as arrays.

        Raises:
            InputError: images, or labels that do not fit them or the model.
        """
        support, query = self._images(given[SUPPORT_X]), self._images(given[QUERY_X])
        labels = torch.as_tensor(given[SUPPORT_Y], dtype=torch.int64)
        way = self._config.data.way
        if len(labels) != len(support) or not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= way:
            raise InputError(
                f"{SUPPORT_Y}: {labels.tolist()[:20]} given for {len(support)} images; give one label for each, of 0 to {way - 1}"
            )
        labels = labels.to(support.device)
        with torch.no_grad():
            if params.get(INDUCTIVE):
                phi = self._learner.adapt_parameters(support[None], labels[None]).params
                logits = self._learner.functional.predict_inductive(phi, support[None], query[None])[0]
            else:
                logits = self._learner.adapt(support, labels)(query)
        return {LABELS: logits.argmax(-1).cpu().numpy(), LOGITS: logits.float().cpu().numpy()}

    def _images(self, pixels: Any) -> Tensor:
        images = torch.as_tensor(pixels)
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise InputError(f"images: {images.dtype} of shape {list(images.shape)} given; give uint8 [n, H, W, C]")
        planes = images.to(self._config.run.device).permute(0, 3, 1, 2)
        return planes.to(dtype_of(self._config), memory_format=torch.contiguous_format).div_(255.0)
