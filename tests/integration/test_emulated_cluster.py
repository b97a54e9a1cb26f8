"""The cluster of the overlay's own RayJob on pretend machines: Ray started as KubeRay would start it, jobs sent to it, pods lost."""

import json
import subprocess
import sys

import pytest
from helpers import netns
from helpers.command import Command, wait_for_step
from helpers.manifests import of_job
from helpers.pods import pods
from helpers.runs import fingerprint, tiny, train_alone, write_config

WHY_NOT = netns.why_not()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

STEPS = 60
"""Of the runs that something happens to."""

UNAUTHORISED = """
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/api/jobs/")
except urllib.error.HTTPError as error:
    print(error.code)
"""


@pytest.fixture
def cluster(tmp_path):
    """The pods of `dev`'s training job."""
    with pods(of_job("dev", "train"), tmp_path) as started:
        yield started


@pytest.fixture
def imaml(cluster, tmp_path):
    """`imaml ...` on the user's machine, which is none of the cluster's, with the token."""
    folder = tmp_path / "work"
    folder.mkdir()

    def started(*words, **env):
        inside = cluster.machines.inside(cluster.user)
        env = {"RAY_AUTH_TOKEN": cluster.token, "HOME": str(tmp_path), "COLUMNS": "300", **env}
        return Command(*words, "--address", cluster.dashboard, cwd=folder, inside=inside, **env)

    return started


@pytest.fixture
def training(data, tmp_path):
    """The command that submits a run of some length, and the run's folder, which all pods see."""
    run = {"steps": STEPS, "checkpoint_every": 2, "backend": "ray", "workers": 2, "device": "cpu"}
    config = write_config(tmp_path / "long.yaml", data, **run)
    return ("submit", str(config), "--run-dir", str(tmp_path / "run")), tmp_path / "run"


@pytest.fixture(scope="module")
def gold(data, tmp_path_factory):
    """That run in one process, undisturbed."""
    return train_alone(tiny(data, steps=STEPS, checkpoint_every=2), tmp_path_factory.mktemp("gold") / "run")


def starts(run):
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def check(run, gold):
    """The same result, and every step once."""
    assert json.loads((run / "summary.json").read_text())["params_sha256"] == gold["params"]
    assert fingerprint(run) == gold
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))


def test_a_job_on_the_cluster_of_the_manifest_ends_in_the_bits_of_one_process(cluster, imaml, data, tmp_path):
    """Nobody without the token has one; its output and its exit code arrive, and that of one that fails."""
    config = write_config(tmp_path / "tiny.yaml", data, backend="ray", workers=2, device="cpu")
    submit = ("submit", str(config), "--run-dir", str(tmp_path / "run"))
    with imaml(*submit, RAY_AUTH_TOKEN="") as refused:
        assert refused.wait() == 3 and "asks for a token" in refused.output, refused.output
    done = subprocess.run(
        [*cluster.machines.inside(cluster.user), sys.executable, "-c", UNAUTHORISED, cluster.dashboard],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "401"
    with imaml(*submit) as job:
        assert job.wait() == 0, job.output
    assert "starting 2 Ray workers" in job.output and cluster.token not in job.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params_sha256"] == train_alone(tiny(data), tmp_path / "gold")["params"]
    assert summary["world_size"] == 2
    with imaml(*submit, "--set", "data.url=/nowhere", "--id", "lost") as job:
        assert job.wait() == 2 and "/nowhere" in job.output, job.output


def test_a_job_can_be_cancelled_from_outside_and_has_written_a_checkpoint(imaml, training):
    submit, run = training
    with imaml(*submit, "--id", "cancelled", "--set", "run.steps=20000", "--set", "run.checkpoint_every=10000") as job:
        wait_for_step(run / "metrics.jsonl", 3, job)
        with imaml("jobs", "cancel", "cancelled") as cancel:
            assert cancel.wait() == 0 and "job cancelled: STOPPED" in cancel.output, cancel.output
        assert job.wait() == 130, job.output
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_workers_pod_is_killed_and_replaced_and_the_bits_are_those_of_one_process(
    cluster, imaml, training, gold, rank
):
    submit, run = training
    with imaml(*submit) as job:
        wait_for_step(run / "metrics.jsonl", 5, job)
        pid = starts(run)[0]["pids"][rank]
        cluster.replace(next(i for i in cluster.workers if pid in cluster.machines.processes(i)))
        assert job.wait(400) == 0, job.output
    check(run, gold)
    first, *later = starts(run)
    assert first["step"] == 0 and later
    assert all(start["world_size"] == 2 for start in later) and later[-1]["step"] > 0


def test_the_heads_pod_is_killed_and_the_job_sent_again_to_a_new_cluster_goes_on(cluster, imaml, training, gold):
    """Which is what `backoffLimit` does. Whoever followed the job that was lost is told."""
    submit, run = training
    with imaml(*submit) as job:
        wait_for_step(run / "metrics.jsonl", 5, job)
        cluster.lose_head()
        assert job.wait() == 3, job.output
    assert "is no longer there" in job.output or "nothing answers" in job.output, "the latter of a slow machine"
    with imaml(*submit) as job:
        assert job.wait(400) == 0, job.output
    check(run, gold)
    assert [start["world_size"] for start in starts(run)] == [2, 2]
    assert starts(run)[0]["step"] == 0 < starts(run)[1]["step"]
