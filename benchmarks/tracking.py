"""What does MLflow cost a meta-step: with a server there, and with one that is away?

imaml prepare glyphs --out data/glyphs
python benchmarks/tracking.py --data data/glyphs --json tracking.json

Meta-steps of one process (5-way 1-shot, Conv-4, the defaults, `--tasks` of them a step), each of which writes a line of metrics of
the usual size that a thread of the same process sends: the hardest case, for workers of Ray leave that thread to the driver.
Rounds without tracking, with a server, and with nobody at its address take turns. A step that the thread was sending in is set beside
the median step of the same round in which it was not: `added` is the median of these differences, `worst` the largest; for comparison
stands what chance alone does to the steps in which nothing was sent. `cpu` is the largest processor time of one attempt to send, over
the median step: what it can take from a step at most, whatever else the machine does.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from meta_gradient import facts

from imaml_dist.config.load import build_config
from imaml_dist.distributed.build import make_learner, make_source, open_dataset, prepare_process, resolve
from imaml_dist.tracking import metrics_file
from imaml_dist.tracking.mlflow_link import RunFacts
from imaml_dist.tracking.mlflow_run import MlflowRun

AWAY = "http://127.0.0.1:9"
"""The port of the service "discard", which nobody runs."""

FACTS = RunFacts("tracking", "tracking", {}, {})


class Watched(MlflowRun):
    """A tracker that notes when it sends."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, run / "metrics.jsonl", FACTS)
        self.spans: list[tuple[float, float]] = []
        self.cpu: list[float] = []

    def _send(self) -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            super()._send()
        finally:
            self.spans.append((began, time.perf_counter()))
            self.cpu.append(time.thread_time() - cpu)


def steps_of(round_s: float, step: Any, run: Path, tracker: Watched | None, first: int) -> list[dict[str, float]]:
    """Meta-steps for so many seconds: how long each took, and whether something was sent in it."""
    taken: list[dict[str, float]] = []
    end = time.perf_counter() + round_s
    while time.perf_counter() < end:
        began = time.perf_counter()
        step(first + len(taken))
        record = {f"seconds_metric_{n}": 0.5 * n for n in range(35)}
        metrics_file.append(run / "metrics.jsonl", {"step": first + len(taken), "time": time.time(), **record})
        taken.append({"began": began, "ended": time.perf_counter()})
    spans = [] if tracker is None else list(tracker.spans)
    for one in taken:
        one["sent"] = float(any(a < one["ended"] and b > one["began"] for a, b in spans))
    return taken


def measure(step: Any, rounds: int, round_s: float, uris: dict[str, str | None]) -> dict[str, Any]:
    """Every kind of tracking in turns; relative to the median of the quiet steps of its round."""
    added: dict[str, dict[str, list[float]]] = {kind: {"sent": [], "quiet": [], "cpu": []} for kind in uris}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for kind, uri in uris.items():
                run = Path(folder) / f"{kind}-{number}"
                run.mkdir()
                tracker = None
                if uri is not None:
                    os.environ["MLFLOW_TRACKING_URI"] = uri
                    tracker = Watched(run)
                    tracker.start()
                    time.sleep(0.5)
                taken = steps_of(round_s, step, run, tracker, 0)
                if tracker is not None:
                    tracker._closing.set()
                    assert tracker._thread is not None
                    tracker._thread.join()
                times = [one["ended"] - one["began"] for one in taken]
                quiet = statistics.median(t for t, one in zip(times, taken, strict=True) if not one["sent"])
                # The first one makes the run, or is the first to find nobody.
                added[kind]["cpu"] += [] if tracker is None else [cpu / quiet for cpu in tracker.cpu[1:]]
                for seconds, one in zip(times, taken, strict=True):
                    added[kind]["sent" if one["sent"] else "quiet"].append(seconds / quiet - 1)
    return {
        kind: {
            name: {"steps": len(values), "added": statistics.median(values), "worst": max(values)}
            for name, values in found.items()
            if values
        }
        for kind, found in added.items()
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/glyphs")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--server", help="address of an mlflow server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = resolve(build_config({"name": "tracking", "data": {"url": options.data}}), cuda=False)
    prepare_process(config)
    source = make_source(config, open_dataset(config), "train")
    learner = make_learner(config, source.image_shape)
    episodes = source.episodes(0, range(options.tasks))

    def step(number: int) -> None:
        for begin in range(0, options.tasks, 4):
            learner.task_gradients(episodes[begin : begin + 4])

    step(0)
    Watched(Path(tempfile.mkdtemp()))._link.client  # noqa: B018 - the import is not what is measured
    uris = {"none": None, "away": AWAY} | ({"there": options.server} if options.server else {})
    found = measure(step, options.rounds, options.seconds, uris)
    print(f"{'':8}{'steps':>8}{'added':>9}{'worst':>9}")
    for kind, parts in found.items():
        for name, part in parts.items():
            print(f"{kind:6} {name:6}{part['steps']:>5}{part['added']:>9.1%}{part['worst']:>9.1%}")
    if options.json:
        options.json.write_text(
            json.dumps({**facts(), "threads": torch.get_num_threads(), "tracking": found}, indent=1)
        )


if __name__ == "__main__":
    main()
