"""`imaml submit`: an experiment's configuration -> a RayJob that trains it on Kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import kuberay, rules
from cluster.kube_options import KubeOptions, load_kube_options
from cluster.resources import Needs, quantity
from imaml_dist.config.load import load_config, to_yaml
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ConfigError, InputError
from imaml_dist.storage.opening import S3


def rayjob(
    config_path: Path, overrides: Sequence[str], run_dir: str, options_path: Path | None, given: dict[str, Any]
) -> dict[str, Any]:
    """The RayJob of an experiment.

    Args:
        config_path: configuration file.
        overrides: `section.field=value`, which the manifest's configuration has applied.
        run_dir: `s3://` URL where the run is kept; the job is resumed from there.
        options_path: file of `KubeOptions`.
        given: options that win over the file's.

    Raises:
        InputError: configuration, options and run directory cannot be used, or not together.
    """
    config = load_config(config_path, overrides)
    options = load_kube_options(options_path, given)
    _check_reachable(config, run_dir)
    if quantity(options.cache, "cache") < 1.1 * config.storage.cache_bytes:
        raise InputError(
            f"cache: {options.cache} given, but storage.cache_bytes = {config.storage.cache_bytes} and the kernels must fit, or pods are "
            "evicted; raise it, or lower storage.cache_bytes"
        )
    made = kuberay.rayjob(_run(config, run_dir, options), options)
    if wrong := rules.broken(made):
        raise InputError("\n".join(wrong))
    return made


def needs(config: ExperimentConfig, memory: float = 0.0) -> Needs:
    """What a run asks of a cluster.

    Args:
        config: of the run.
        memory: of each worker in bytes.
    """
    fewest, most = config.run.bounds
    gpus = config.run.gpus_per_worker if config.run.device == "cuda" else 0.0
    return Needs(fewest, most, float(config.run.threads), gpus, memory)


def _run(config: ExperimentConfig, run_dir: str, options: KubeOptions) -> kuberay.Run:
    command = ("imaml", "train", kuberay.CONFIG_FILE, "--run-dir", run_dir)
    return kuberay.Run(config.name, command, to_yaml(config), needs(config, quantity(options.memory, "memory")))


def _check_reachable(config: ExperimentConfig, run_dir: str) -> None:
    """Pods share no folder, with each other or with the user."""
    places = {"--run-dir": run_dir, "data.url": config.data.url, "validate.manifest": config.validation.manifest}
    for what, url in places.items():
        if url is None:
            continue
        if "@" in url:
            raise InputError(f"{what}: credentials do not belong in a URL; take them out, and keep them in a Secret")
        if not url.startswith(S3):
            raise InputError(
                f"{what}: {url} given, but pods share no folder; give an s3:// URL, such as s3://bucket/name"
            )
    if config.warm_start.path is not None:
        raise ConfigError(
            f"warm_start.path: {config.warm_start.path} given, but it is read from a folder, which pods do not have; train from the start"
        )
    if config.run.backend != "ray":
        raise ConfigError("run.backend: local given, but pods work together by Ray; use --set run.backend=ray")
    if config.run.device == "auto":
        raise ConfigError(
            "run.device: auto given, but what nodes are wanted cannot be seen from here; use --set run.device=cpu or cuda"
        )
