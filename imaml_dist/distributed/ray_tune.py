"""Ray Tune runs the trials of a sweep: so many at a time, stopped early where a scheduler says so, again after a crash.

Tune decides nothing that would be lost with it. What is tried and how it ended stands in the sweep's ledger (`Search`); what
schedulers know is told them again from the trials' metrics; Tune's own files are scratch.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.errors import ClusterError, brief
from imaml_dist.sweeps.ledger import Trial
from imaml_dist.sweeps.search import METRIC, TIME, Search
from imaml_dist.tracking import metrics_file

KEEPER_BYTES = 64 << 20
"""Memory that Tune reserves for a keeper which reserves nothing else, its trial's workers being reserved by the trial itself. Not a
part of a CPU, however small: the workers may need all of them."""


@dataclass(frozen=True)
class Need:
    """What a trial takes.

    Attributes:
        workers: how many; the fewest it can begin with.
        most: as many as it may come to have.
        each: what Ray reserves for one.
        on_ray: whether they are Ray's workers, or the trial's own process is the only one.
    """

    workers: int
    most: int
    each: dict[str, float]
    on_ray: bool


def need_of(configs: list[ExperimentConfig]) -> Need:
    """What the largest of these needs."""
    runs = [config.run for config in configs]
    each = {"CPU": float(max(run.threads for run in runs))}
    if any(run.device == "cuda" for run in runs):
        each["GPU"] = max(run.gpus_per_worker for run in runs)
    on_ray = any(run.backend == "ray" for run in runs)
    fewest, most = (max(run.bounds[side] for run in runs) if on_ray else 1 for side in (0, 1))
    return Need(fewest, most, each, on_ray)


def tune_on_ray(search: Search, need: Need, at_a_time: int, command: list[str], environment: Mapping[str, str]) -> None:
    """Train all trials that are left, on the Ray cluster this process is connected to.

    Call it outside of the main thread if signals shall be one's own: Tune takes over SIGINT otherwise.

    Args:
        search: hands the trials out.
        need: of a trial.
        at_a_time: trials.
        command: that trains; a configuration, a run directory and the keeper's process id are added.
        environment: of that command, besides the node's own; nothing secret, for Ray keeps it.

    Raises:
        ClusterError: Ray itself gave up. The same sweep can go on.
    """
    if not search.left:
        return
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_THRESHOLD_S": "60",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    from ray.exceptions import RayError
    from ray.tune import FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, TuneError, Tuner, with_resources

    from imaml_dist.distributed.ray_search import Losses, RaySearcher, make_scheduler, replay
    from imaml_dist.distributed.ray_trial import TrialKeeper

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the ledger tells of trials that crash
    directory, config = search.directory, search.sweep.config
    reserved = {"memory": float(KEEPER_BYTES)} if need.on_ray else need.each

    def order(trial: Trial) -> dict[str, Any]:
        config_file, run = (str(p.resolve()) for p in (directory.config_file(trial), directory.run(trial).path))
        return {
            "number": trial.number,
            "run": run,
            "log": str(directory.log_file(trial).resolve()),
            "stop": str(directory.stop_file.resolve()),
            "command": [*command, config_file, run],
            "cwd": os.getcwd(),
            "on_ray": need.on_ray,
            "environment": dict(environment),
        }

    scheduler = make_scheduler(config.scheduler, search.longest)
    replay(scheduler, ended_trials(search))
    tuner = Tuner(
        with_resources(TrialKeeper, PlacementGroupFactory([reserved])),
        tune_config=TuneConfig(
            search_alg=RaySearcher(search, order),
            scheduler=scheduler,
            num_samples=search.left + 1,  # the searcher has the last word
            max_concurrent_trials=at_a_time,
        ),
        run_config=RunConfig(
            name=f"start-{os.getpid()}",
            storage_path=str(directory.ray_scratch.resolve()),
            failure_config=FailureConfig(max_failures=config.retries),
            callbacks=[Losses(search)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (TuneError, RayError) as error:
        raise ClusterError(
            f"Ray Tune gave up ({brief(error)}); run the same command again, and the sweep goes on where it is"
        ) from error
    finally:
        shutil.rmtree(directory.ray_scratch, ignore_errors=True)


def ended_trials(search: Search) -> list[tuple[Trial, list[dict[str, Any]]]]:
    """Trials that have ended, in order of their end, with what they would report again."""
    ended = sorted((t for t in search.ledger.trials if t.ended is not None), key=lambda t: t.ended or 0.0)
    return [(trial, _reports(search.directory.run(trial).metrics_file, trial)) for trial in ended]


def _reports(metrics: Path, trial: Trial) -> list[dict[str, Any]]:
    return [
        {TIME: record["step"] + 1, METRIC: record[METRIC]}
        for record in metrics_file.read(metrics)
        if record.get(METRIC) is not None and record["step"] < trial.result.steps
    ]
