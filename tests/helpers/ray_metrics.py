"""What a real Ray node exports for Prometheus while a command observes lines of metrics."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from helpers.ray_cluster import ROOT, clean_environment
from helpers.s3_server import free_port

EXPORT = """
import json, sys, time, urllib.request
import ray
from cluster.metrics import RunMetrics
port = int(sys.argv[1])
ray.init(
    address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 << 20, _node_ip_address="127.0.0.1",
    _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500}, log_to_driver=False,
)
metrics = RunMetrics("mine")
for line in map(json.loads, sys.stdin):
    metrics.observe(line)
metrics.restarted(1)
deadline, text = time.monotonic() + 60, ""
while time.monotonic() < deadline and not all(name in text for name in ("imaml_restarts", "imaml_solves", "ray_node_cpu")):
    time.sleep(0.5)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        pass
print(text)
ray.shutdown()
"""


def scraped(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Every series of Ray's and of ours, after the run `mine` has recorded these and been restarted once: (name, labels, value)."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(free_port())],
        env={
            **clean_environment(),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        },
        input="\n".join(map(json.dumps, records)),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    for name, labels, value in re.findall(r"^(ray_\w+)\{(.*)\} (\S+)$", done.stdout, re.MULTILINE):
        yield name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)
