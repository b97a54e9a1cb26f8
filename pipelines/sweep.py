"""`imaml sweep`: train the trials of a sweep, test the best one, and write all of it down; the same command again resumes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.resources import nodes, room
from cluster.session import ray_session
from imaml_dist.config.load import to_yaml
from imaml_dist.config.load_sweep import load_sweep
from imaml_dist.config.schema import ExperimentConfig
from imaml_dist.data.dataset import Dataset
from imaml_dist.data.frozen import freeze, publish
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, resolve
from imaml_dist.distributed.ray_tune import Need, need_of, tune_on_ray
from imaml_dist.errors import ClusterError, InputError, TrainingError
from imaml_dist.storage.local import exclusive, local_path
from imaml_dist.sweeps.directory import SweepDirectory
from imaml_dist.sweeps.feasible import check_feasible, trials_of
from imaml_dist.sweeps.ledger import Ledger, Trial
from imaml_dist.sweeps.outcome import best_of, outcome
from imaml_dist.sweeps.search import Search
from pipelines import console, kernels
from pipelines.background import Background
from pipelines.evaluate import evaluate_run
from pipelines.signals import on_signals
from pipelines.summary import versions
from pipelines.sweep_table import SweepTable, show_outcome
from pipelines.sweep_tracking import SweepTracking, server
from pipelines.train import gpus_elsewhere, here

POLL_S = 0.5

GOES_ON = "the same command goes on with the sweep"


def sweep(path: Path, overrides: Sequence[str], sweep_dir: str | None, fresh: bool) -> bool:
    """Run a sweep as a file says.

    Returns:
        True when it is finished; False when it was interrupted.

    Raises:
        ImamlError: see the exit codes in `imaml_dist.errors`.
    """
    sys.path.insert(0, os.getcwd())  # a user's own model factory lies beside their configuration
    asked = load_sweep(path, overrides)
    trials = trials_of(asked.config, asked.where)
    possible = check_feasible(asked)
    base = asked.base()
    dataset = open_dataset(base)
    _check_data(possible, dataset)
    content = freeze(make_source(base, dataset, "val"), asked.config.validation.tasks)
    directory = SweepDirectory(local_path(sweep_dir or Path("runs") / asked.config.name))
    directory.check_usable()
    directory.path.mkdir(parents=True, exist_ok=True)
    with exclusive(directory.driver_lock) as held:
        if not held:
            raise InputError(
                f"{directory.path} is being swept by another imaml sweep; wait for it, or choose another --sweep-dir"
            )
        directory.begin(asked, fresh=fresh)
        publish(str(directory.validation_file), content)
        ledger = Ledger(directory.ledger_file)
        resolved = partial(_resolved, native=kernels.usable)
        search = Search(asked, ledger, directory, resolved, trials)

        def need() -> Need:
            return need_of([resolved(one) for one in possible])

        return _run(search, need, dataset, hashlib.sha256(content).hexdigest())


def _run(search: Search, need: Callable[[], Need], dataset: Dataset, validation: str) -> bool:
    """Train, test and tell; False after a request to stop. MLflow hears of every end but that of a process which is killed."""
    tracking = SweepTracking(search)
    status, found = "FAILED", None
    with on_signals(_leave, GOES_ON):
        try:
            if search.left and not _train(search, need(), tracking.begin()):
                _leave()
            with on_signals(_leave, GOES_ON):  # anew: Ray, as it ends, leaves SIGTERM to kill the process
                found = _conclude(search, dataset, validation)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):  # the second is what Ray makes of SIGTERM
            status = "KILLED"
            again = f"interrupted; the same command goes on with the sweep: {search.directory.path}"
            console.err.print(again, soft_wrap=True)
        finally:
            with on_signals(_wait, GOES_ON):
                tracking.close(status, found)
    return status == "FINISHED"


def _check_data(possible: Sequence[ExperimentConfig], dataset: Dataset) -> None:
    """Find what is wrong with episodes and models of trials before anything is started."""
    seen: list[Any] = []
    for config in possible:
        parts = (config.data, config.model, config.algorithm.kind, config.loss, config.run.precision)
        if parts not in seen:
            seen.append(parts)
            make_source(config, dataset, "train")
            make_learner(here(_resolved(config, lambda: False)), dataset.index.image_shape)


def _resolved(config: ExperimentConfig, native: Callable[[], bool]) -> ExperimentConfig:
    """A trial's configuration as the node has it that it is trained on."""
    return resolve(config, cuda=torch.cuda.is_available() or gpus_elsewhere(config, trial=True), native=native)


def _train(search: Search, need: Need, parent: str) -> bool:
    """Whether all trials have ended; False after a request to stop."""
    asked = search.sweep.config.max_concurrent
    wanted = 1 if asked == "auto" else min(asked, search.left)
    with ray_session(int(wanted * need.workers * need.each.get("CPU", 0.0))):
        slots = room(nodes(), need.each)
        if slots < wanted * need.workers:
            each = " and ".join(f"{amount:g} {kind}{'s' if amount > 1 else ''}" for kind, amount in need.each.items())
            trials = "a trial needs" if wanted == 1 else f"{wanted} trials at a time (max_concurrent) need"
            raise ClusterError(
                f"{trials} {wanted * need.workers} workers with {each} each, the Ray cluster has room for {slots}; lower run.workers, "
                "run.threads, run.gpus_per_worker or max_concurrent"
            )
        at_a_time = min(search.left, max(1, slots // need.most) if asked == "auto" else asked)
        console.out.print(
            f"{search.left} trials to train, {at_a_time} at a time, each with "
            + (f"{need.most} worker(s) on Ray" if need.on_ray else "one process"),
            soft_wrap=True,
        )
        command = [sys.executable, "-m", "pipelines.trial", parent]
        tuning = Background("tune", lambda: tune_on_ray(search, need, at_a_time, command, server()))

        def ask() -> None:
            console.err.print("stopping as soon as all trials have saved their state; once more to stop at once")
            search.directory.stop_file.touch()

        with on_signals(ask, GOES_ON), SweepTable(search) as table:
            tuning.start()
            while tuning.is_alive():
                tuning.join(POLL_S)
                table.update()
        tuning.outcome()
    left = [trial.number for trial in search.ledger.trials if trial.status == "running"]
    if (left or search.left) and not search.directory.stop_file.exists():
        raise ClusterError(
            f"Ray Tune ended before all trials had (trials {left} had begun); run the same command again, and the sweep goes on"
        )
    return not (left or search.left)


def _leave() -> None:
    """Where nothing goes on that has a state to save."""
    raise KeyboardInterrupt


def _wait() -> None:
    """Where the end is near."""
    console.err.print("MLflow is being told how the sweep ended; once more to stop at once")


def _conclude(search: Search, dataset: Dataset, validation: str) -> dict[str, Any]:
    """Write down what came out, test the best trial, and show it all."""
    directory, base, trials = search.directory, search.sweep.base(), search.ledger.trials
    best = best_of(trials)
    if best is None:
        reason = next((trial.why for trial in trials if trial.why), "none of them was validated")
        raise TrainingError(
            f"none of {len(trials)} trials can be used; trial {trials[0].number}: {reason}; see {directory.logs}"
        )
    directory.best_file.write_text(to_yaml(search.sweep.experiment(best.values, {})), encoding="utf-8")
    facts = {"fingerprint": dataset.index.fingerprint, "validation_sha256": validation, "versions": versions()}
    found = outcome(search.sweep, trials, facts, _tested(search, best, base, dataset))
    directory.write_json(directory.outcome_file, found)
    from imaml_dist.reporting.sweep_report import write_sweep_report

    write_sweep_report(directory.path)
    show_outcome(found, directory)
    return found


def _tested(search: Search, best: Trial, base: ExperimentConfig, dataset: Dataset) -> dict[str, Any] | None:
    """The best trial on the frozen test tasks, once: a sweep that is only shown again does not look at them again."""
    directory = search.directory
    if not base.evaluate.tasks:
        return None
    content = freeze(make_source(base, dataset, "test"), base.evaluate.tasks)
    publish(str(directory.test_file), content)
    before = directory.read_outcome()
    tested = (before or {}).get("test")
    if tested is not None and (tested["trial"], tested["manifest_sha256"]) == (
        best.number,
        hashlib.sha256(content).hexdigest(),
    ):
        return dict(tested)
    found = evaluate_run(directory.run(best).path, manifest=str(directory.test_file))
    return {"trial": best.number, **{key: value for key, value in found.items() if not key.startswith("per_task")}}
