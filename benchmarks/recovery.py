"""How long does a run stand still when a part of it is lost, and how much of its time is left under one loss after the other?

imaml prepare glyphs --out data/glyphs
python benchmarks/recovery.py --data data/glyphs --repeats 5 --json recovery.json
python benchmarks/recovery.py --data data/glyphs --soak 10 --json soak.json

`imaml train` trains on a private Ray cluster with two workers (5-way 1-shot, Conv-4, the defaults). Losses: SIGKILL of the
process of rank 0 or 1, SIGSTOP of one, SIGKILL of both, and of a keeper, which is a Ray actor, so that Ray starts all of them
again. Recovery is from the signal to the next line of metrics with a step that was not there before. A soak sends the next
loss, drawn with a seed, 20 s after each recovery; then the same number of steps is trained undisturbed, and both results must be
equal in every bit. Goodput is the time that so many steps take by themselves, by the median of the very same steps, over the time that
all of it took.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from meta_gradient import facts

from imaml_dist.tracking import metrics_file
from imaml_dist.training import checkpoints
from imaml_dist.training.run_directory import RunDirectory
from imaml_dist.training.state import sha256_of

SILENCE, COLLECTIVE = 5.0, 30.0
"""Seconds; run.heartbeat_timeout and run.collective_timeout."""

BETWEEN_S = 20.0

LOSSES = ("kill rank 0", "kill rank 1", "stop rank 1", "kill both ranks", "kill a keeper")


def configuration(data: str) -> dict[str, Any]:
    """The defaults, without what is done besides training."""
    run = {"steps": 10**6, "checkpoint_every": 20, "heartbeat_timeout": SILENCE, "collective_timeout": COLLECTIVE}
    return {
        "name": "recovery",
        "data": {"url": str(Path(data).resolve()), "way": 5, "shot": 1, "query": 5},
        "run": {**run, "device": "cpu"},
        "validate": {"tasks": 0},
        "evaluate": {"tasks": 0},
        "tracking": {"mlflow": False},
    }


class Training:
    """A running `imaml train`."""

    def __init__(self, folder: Path, name: str, raw: dict[str, Any], *overrides: str) -> None:
        self.run = RunDirectory(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        words = [word for override in overrides for word in ("--set", override)]
        command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "train",
            str(folder / f"{name}.yaml"),
            "--run-dir",
            str(self.run.path),
        ]
        self.process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL)

    def wait_beyond(self, step: int, timeout: float = 180.0) -> int:
        """Wait for a later step; the newest one."""
        deadline = time.monotonic() + timeout
        while (newest := self.newest()) <= step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.run.path}: no step after {step}; the command ended with {self.process.poll()}")
            time.sleep(0.02)
        return newest

    def newest(self) -> int:
        """The last step on record."""
        return metrics_file.reached(self.run.metrics_file) - 1

    def lose(self, loss: str, choose: random.Random) -> None:
        """Bring a loss about."""
        pids = self.run.starts()[-1]["pids"]
        victims = pids if "both" in loss else [choose.choice(pids)]
        if "rank" in loss and "both" not in loss:
            victims = [pids[int(loss[-1])]]
        if "keeper" in loss:
            victims = [int(Path(f"/proc/{victims[0]}/stat").read_text().rpartition(")")[2].split()[1])]
        for pid in victims:
            os.kill(pid, signal.SIGSTOP if "stop" in loss else signal.SIGKILL)

    def recovery(self, loss: str, choose: random.Random) -> float:
        """Seconds that a loss costs."""
        before, began = self.newest(), time.monotonic()
        self.lose(loss, choose)
        # A step that was all but written when the signal came is none of the recovery's.
        starts = len(self.run.starts())
        while len(self.run.starts()) == starts:
            if time.monotonic() - began > 180:
                raise SystemExit(f"{loss}: nothing was started again")
            time.sleep(0.02)
        self.wait_beyond(max(before, self.newest()))
        return time.monotonic() - began

    def end(self) -> None:
        """Have it write its last checkpoint, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def measured(folder: Path, data: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each loss, one after the other in one run."""
    found: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    training, choose = Training(folder, "run", configuration(data)), random.Random(0)
    try:
        for _ in range(repeats):
            for loss in LOSSES:
                training.wait_beyond(training.newest() + 8)  # the spare has been started, and more
                time.sleep(5.0)
                found[loss].append(training.recovery(loss, choose))
                print(f"{loss}: {found[loss][-1]:.1f} s", flush=True)
    finally:
        training.end()
    return found


def soak(folder: Path, data: str, minutes: float, seed: int) -> dict[str, Any]:
    """One loss after the other."""
    training, choose = Training(folder, "soak", configuration(data)), random.Random(seed)
    training.wait_beyond(3)
    began, first, suffered = time.monotonic(), training.newest(), []
    while time.monotonic() - began < 60 * minutes:
        time.sleep(BETWEEN_S)
        loss = choose.choice(LOSSES)
        suffered.append((loss, training.recovery(loss, choose)))
        print(
            f"{(time.monotonic() - began) / 60:.1f} min, step {training.newest()}, {loss}: {suffered[-1][1]:.1f} s",
            flush=True,
        )
    last, wall = training.newest(), time.monotonic() - began
    training.end()
    end = max(checkpoints.steps(training.run.checkpoints))
    calm = Training(folder, "calm", configuration(data), f"run.steps={end}")
    calm.process.wait()
    step_seconds = statistics.median(r["seconds_step"] for r in metrics_file.read(training.run.metrics_file))
    states = [checkpoints.load(checkpoints.path_of(run.checkpoints, end)) for run in (training.run, calm.run)]
    hashes = {(sha256_of(tensors), facts["ledger"]["digest"]) for tensors, facts in states}
    lines = [record["step"] for record in metrics_file.read(training.run.metrics_file)]
    return {
        "steps": end,
        "losses": len(suffered),
        "recoveries": suffered,
        "mean_time_to_recovery": statistics.mean(seconds for _, seconds in suffered),
        "goodput": (last - first) * step_seconds / wall,
        "same_bits": len(hashes) == 1,
        "every_step_once": lines == list(range(end)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/glyphs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.soak:
            found: dict[str, Any] = soak(Path(name), options.data, options.soak, options.seed)
            print({key: value for key, value in found.items() if key != "recoveries"})
        else:
            found = {"recoveries": measured(Path(name), options.data, options.repeats)}
            for loss, seconds in found["recoveries"].items():
                spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
                print(f"{loss:20} {statistics.median(seconds):6.1f} s  ({spread}, {len(seconds)} times)")
    if options.json:
        options.json.write_text(json.dumps({**facts(), **found}, indent=1))


if __name__ == "__main__":
    main()
