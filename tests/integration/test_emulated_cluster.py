"""The cluster of the overlay's own RayJob on pretend machines: Ray started as KubeRay would start it, a job sent to it, and its bits."""

import json
import os
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from helpers import netns
from helpers.command import ROOT
from helpers.manifests import of_job
from helpers.ray_cluster import clean_environment
from helpers.runs import tiny, train_alone, write_config

from cluster.reproduce import ray_starts

pytestmark = [pytest.mark.netns, pytest.mark.slow]

SUBMIT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("http://127.0.0.1:8265")
job = client.submit_job(entrypoint=sys.argv[1], submission_id="train")
while not client.get_job_status(job).is_terminal():
    time.sleep(0.5)
print(client.get_job_status(job).value, client.get_job_info(job).driver_exit_code)
print(client.get_job_logs(job))
"""

UNAUTHORISED = """
import urllib.error, urllib.request
try:
    urllib.request.urlopen("http://127.0.0.1:8265/api/jobs/")
except urllib.error.HTTPError as error:
    print(error.code)
"""


@contextmanager
def as_kuberay_starts_it(job, made, folder):
    """The environment of the head, once it and all workers are up. Their object stores are those of a test."""
    head, workers = ray_starts(job, made.addresses[0], "emulated")
    assert workers.pods == len(made.addresses) - 1
    own = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "IMAML_KERNELS": os.environ["IMAML_KERNELS"],
        "PYTHONPATH": str(ROOT),
    }
    started, environment = [], {}
    for i, one in enumerate([head, *[workers] * workers.pods]):
        assert one.secrets["RAY_AUTH_TOKEN"] == "emulated/auth_token"
        environment[i] = {**clean_environment(), **one.environment, "IMAML_CACHE": str(folder / "cache"), **own}
        words = [w for w in one.command[1:] if not w.startswith("--object-store-memory")]
        words += [f"--object-store-memory={80 << 20}", f"--node-ip-address={made.addresses[i]}"]
        log = folder / f"ray-{i}.log"
        with open(log, "wb") as output:
            ray = [*made.inside(i), sys.executable, "-m", "ray.scripts.scripts", *words]
            started.append(
                subprocess.Popen(ray, env=environment[i], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
        deadline = time.monotonic() + 90
        while b"Ray runtime started" not in log.read_bytes():
            assert started[-1].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    yield environment[0]
    for i in range(len(started)):
        made.kill(i)
    for process in started:
        process.wait(30)


@pytest.mark.timeout(400)
def test_a_job_on_the_cluster_of_the_manifest_ends_in_the_bits_of_one_process(data, tmp_path):
    if (missing := netns.why_not()) is not None:
        pytest.skip(missing)
    gold = train_alone(tiny(data), tmp_path / "gold")
    config = write_config(tmp_path / "tiny.yaml", data, backend="ray", workers=2)
    command = f"{sys.executable} -m pipelines.cli train {config} --run-dir {tmp_path / 'run'}"
    with netns.machines(3, tmp_path) as made, as_kuberay_starts_it(of_job("dev", "train"), made, tmp_path) as head:

        def on_the_head(*arguments, **env):
            words = [*made.inside(0), sys.executable, "-c", *arguments]
            done = subprocess.run(words, env={**head, **env}, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        assert on_the_head(UNAUTHORISED).strip() == "401"
        output = on_the_head(SUBMIT, command)
        assert output.startswith("SUCCEEDED 0"), output
        assert head["RAY_AUTH_TOKEN"] not in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params_sha256"] == gold["params"]
    assert summary["world_size"] == 2
