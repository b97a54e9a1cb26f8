"""Small sweeps for tests: what they are asked for, and what their directories say while they run."""

import json
import time
from pathlib import Path

import yaml
from helpers.command import Command
from helpers.runs import raw_config

TRIALS, STEPS = 3, 12


def base(data: Path, steps: int) -> dict:
    """A network too small and adapted too little to be right about every image."""
    raw = raw_config(data, steps=steps)
    hard = {"inner": {"steps": 1, "lr": 0.02}, "solver": {"max_iterations": 2}}
    return raw | {
        "model": {"kind": "conv4", "channels": 2},
        "algorithm": {"kind": "imaml", **hard},
        "validate": {"every": 3, "tasks": 12},
    }


def write_sweep(folder: Path, data: Path, steps: int = STEPS, **fields) -> Path:
    raw = {
        "name": "sweep",
        "base": base(data, steps),
        "space": {
            "algorithm.lam": {"kind": "loguniform", "low": 0.05, "high": 20.0},
            "algorithm.solver.max_iterations": {"kind": "grid", "values": [1, 3]},
        },
        "budget": {"trials": TRIALS},
        "validation": {"tasks": 24},
        **fields,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))  # a grid goes by the order of its fields
    return path


def leaderboard(folder: Path) -> list[dict]:
    """The leaderboard of a sweep that has ended, by number of the trial."""
    return json.loads((folder / "sweep.json").read_text())["trials"]


def ledger(folder: Path) -> list[dict]:
    path = folder / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition, command: Command, timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert command.process.poll() is None, f"ended too early:\n{command.wait()}\n{command.output}"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def begun(folder: Path, trial: int) -> bool:
    """Whether a trial has taken a meta-step."""
    metrics = folder / "trials" / f"{trial:04d}" / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0
