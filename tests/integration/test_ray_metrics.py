"""What Prometheus would read of a run, from a real Ray node; and that the dashboard asks for nothing else."""

import json
import re
import subprocess
import sys

from helpers.command import ROOT
from helpers.ray_cluster import clean_environment
from helpers.s3_server import free_port

from cluster.metrics import NAMES

EXPORT = """
import sys, time, urllib.request
import ray
from cluster.metrics import RunMetrics
port = int(sys.argv[1])
ray.init(
    address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 << 20, _node_ip_address="127.0.0.1",
    _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500}, log_to_driver=False,
)
metrics = RunMetrics("mine")
line = {
    "step": 6, "tasks_per_second": 12.5, "query_accuracy": 0.5, "val_accuracy": 0.75, "seconds_step": 2.0, "seconds_solve": 0.5,
    "accepted": 14, "excluded": 2, "excluded_non_finite": 2, "cg_converged": 3, "cg_max_iterations": 11, "cg_residual": 0.1,
    "grad_norm": None, "seconds_data": None,
}
metrics.observe({**line, "step": 5})
metrics.observe(line)
metrics.restarted(1)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        text = ""
    if "imaml_restarts" in text and "imaml_solves" in text:
        break
    time.sleep(0.5)
print("\\n".join(found for found in text.splitlines() if found.startswith("ray_imaml_")))
ray.shutdown()
"""


def exported() -> dict[tuple[str, ...], float]:
    """`(name, sorted labels of ours) -> value`, as scraped."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(free_port())],
        env={
            **clean_environment(),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        },
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    found = {}
    for line in done.stdout.splitlines():
        name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
        ours = re.findall(r'(?:^|,)((?:run|phase|outcome)="[^"]*")', labels)
        found[name, *sorted(ours)] = float(value)
    return found


def test_prometheus_reads_what_the_lines_of_metrics_say():
    run = 'run="mine"'
    assert exported() == {
        ("ray_imaml_tasks_per_second", run): 12.5,
        ("ray_imaml_query_accuracy", run): 0.5,
        ("ray_imaml_val_accuracy", run): 0.75,
        ("ray_imaml_meta_step", run): 7.0,
        ("ray_imaml_restarts", run): 1.0,
        ("ray_imaml_step_seconds", 'phase="step"', run): 2.0,
        ("ray_imaml_step_seconds", 'phase="solve"', run): 0.5,
        ("ray_imaml_tasks_total", 'outcome="accepted"', run): 28.0,
        ("ray_imaml_tasks_total", 'outcome="excluded"', run): 4.0,
        ("ray_imaml_tasks_total", 'outcome="excluded_non_finite"', run): 4.0,
        ("ray_imaml_solves_total", 'outcome="converged"', run): 6.0,
        ("ray_imaml_solves_total", 'outcome="max_iterations"', run): 22.0,
    }


def test_the_dashboard_asks_for_metrics_that_are_exported():
    board = json.loads((ROOT / "k8s" / "monitoring" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) >= 6
    known = {f"ray_{name}" for name in NAMES} | {f"ray_{name}_total" for name in ("imaml_tasks", "imaml_solves")}
    names = {name for expr in asked for name in re.findall(r"\bray_imaml_\w+", expr)}
    assert names <= known
    assert {
        "ray_imaml_tasks_per_second",
        "ray_imaml_step_seconds",
        "ray_imaml_tasks_total",
        "ray_imaml_restarts",
    } <= names
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
