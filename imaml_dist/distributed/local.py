"""The local backend: one worker in this very process, without Ray."""

from __future__ import annotations

from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.distributed.group import Alone
from imaml_dist.distributed.stop import Stop
from imaml_dist.distributed.worker import Worker
from imaml_dist.training.run_directory import RunDirectory


def train_local(config: ExperimentConfig, run: RunDirectory) -> Stop:
    """Train to the end of the configuration or until a stop is requested. Raises what `Worker.run_to_end` raises."""
    return Worker(config, run, Alone()).run_to_end()
