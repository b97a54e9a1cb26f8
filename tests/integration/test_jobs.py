"""`imaml submit --address` and `imaml jobs` on a real cluster of three nodes with a dashboard and a token, all on the loopback."""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import urllib.request
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
from helpers.command import ROOT, Command, imaml, imaml_here
from helpers.gloo import free_port
from helpers.ray_cluster import ray_cluster
from helpers.runs import tiny, train_alone, write_config
from helpers.tcp_proxy import TcpProxy

from cluster.jobs import JobStatus
from cluster.ray_jobs import RayJobs, Submission
from imaml_dist.errors import ClusterError, InputError

CANARIES = {
    "AWS_ACCESS_KEY_ID": "CANARY-1f0a",
    "AWS_SECRET_ACCESS_KEY": "CANARY-2b1c",
    "MLFLOW_TRACKING_PASSWORD": "CANARY-4d3e",
    "GITHUB_TOKEN": "CANARY-5e4f",
}
RUNS = ("--set", "run.device=cpu", "--set", "run.backend=ray")


@pytest.fixture(scope="module")
def cluster():
    """The head has this Python's folder on its PATH, as it would in an image."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    port = free_port()
    with ray_cluster(2, dashboard=port, PATH=path) as started:
        started.port, started.dashboard = port, f"http://127.0.0.1:{port}"
        yield started


@pytest.fixture
def address(cluster, monkeypatch, tmp_path):
    """Of the dashboard, for a user who has the token and other secrets in the environment."""
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in {
        **CANARIES,
        "RAY_AUTH_TOKEN": cluster.env["RAY_AUTH_TOKEN"],
        "HOME": str(tmp_path),
        "COLUMNS": "300",
    }.items():
        monkeypatch.setenv(name, value)
    return cluster.dashboard


def python(code, id="job", identity="x", folder=None):
    return Submission(id, ("python", "-u", "-c", code), identity, "/none", folder or Path(), {})


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "work"
    made.mkdir()
    return made


OWN_MODEL = """
from imaml_dist.models.conv4 import Conv4

def make(image_shape, way, channels):
    return Conv4(image_shape, way, channels, None)
"""


def test_a_run_is_trained_by_a_job_and_a_second_submission_is_the_same_job(
    address, data, tmp_path, folder, monkeypatch
):
    """With a model of the user's own, which lies in the folder that travels."""
    (folder / "own_model.py").write_text(OWN_MODEL)
    own = "model.kind=own_model:make"
    config = write_config(tmp_path / "tiny.yaml", data, workers=2)
    (folder / ".env").write_text("CANARY-in-a-file")
    words = ("submit", str(config), "--run-dir", str(tmp_path / "run"), "--address", address, *RUNS, "--set", own)
    code, output = imaml_here(*words, cwd=folder)
    assert code == 0, output
    (id,) = re.findall(r"^job (tiny-[0-9a-f]{8}): submitted$", output, re.MULTILINE)
    assert "starting 2 Ray workers" in output and "test accuracy" in output.lower()
    assert output.count("starting 2 Ray workers") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    monkeypatch.syspath_prepend(folder)
    assert summary["params_sha256"] == train_alone(tiny(data, own), tmp_path / "gold")["params"]
    assert summary["world_size"] == 2

    code, again = imaml_here(*words, cwd=folder)
    assert code == 0
    assert again.startswith(f"job {id}: there already (SUCCEEDED)")
    assert again.split("\n", 1)[1] == output.split("\n", 1)[1]
    code, listed = imaml_here("jobs", "list", "--address", address, cwd=folder)
    assert code == 0 and listed.count("tiny-") == 1

    request = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        described = answer.read().decode()
    assert id in described
    for secret in ("CANARY", os.environ["RAY_AUTH_TOKEN"]):
        assert secret not in described + output

    code, other = imaml_here(*words, "--id", id, "--set", "run.steps=7", cwd=folder)
    assert code == 2 and "a job with another configuration or run directory" in other


def test_the_jobs_exit_code_is_that_of_the_command_and_a_failed_job_is_tried_again(address, tmp_path, folder):
    config = write_config(tmp_path / "lost.yaml", Path("/nowhere/data"), workers=2)
    words = ("submit", str(config), "--run-dir", str(tmp_path / "run"), "--address", address, "--id", "lost", *RUNS)
    code, output = imaml_here(*words, cwd=folder)
    assert code == 2, output
    assert "/nowhere/data" in output and "job lost failed with exit code 2" in output
    assert "Traceback" not in output
    code, output = imaml_here("jobs", "status", "lost", "--address", address, cwd=folder)
    assert code == 0 and "FAILED" in output and str(tmp_path / "run") in output
    code, output = imaml_here(*words, "--no-follow", cwd=folder)
    assert code == 0 and "job lost-2: submitted" in output
    cancel = re.search(r"imaml (jobs cancel lost-2 .*) stops it", output)[1]
    assert imaml_here(*shlex.split(cancel), cwd=folder)[0] == 0


def test_a_lost_connection_costs_and_repeats_nothing(cluster, address, folder):
    with TcpProxy(cluster.port) as road:
        jobs = RayJobs(road.url)
        code = "import time\nfor i in range(2000):\n    print('line', i, 'é' * 9)\n    time.sleep(0.002)\nraise SystemExit(3)"
        job, is_new = jobs.submit(python(code, "lines", folder=folder))
        assert is_new
        text, cut = "", 0
        for piece in job.logs(follow=True):
            text += piece
            if text.count("line ") > 500 * (cut + 1):
                cut += 1
                road.cut()
        assert cut == 3 and road.cuts >= 3
        assert [int(n) for n in re.findall(r"^line (\d+) é+$", text, re.MULTILINE)] == list(range(2000))
        assert job.result() == job.exit_code == 3
        assert job.status() is JobStatus.FAILED and job.done()
        assert not job.cancel()


def test_of_many_submissions_at_once_one_begins(address, folder):
    jobs = RayJobs(address)
    begun = []
    threads = [
        threading.Thread(target=lambda: begun.append(jobs.submit(python("print(1)", "once", folder=folder))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(is_new for _, is_new in begun) == [False, False, False, True]
    assert {job.id for job, _ in begun} == {"once"}
    assert begun[0][0].result(60) == 0


def test_ctrl_c_lets_the_job_go_on_and_cancel_ends_it(address, folder):
    code = (
        "import signal, time\nsignal.signal(15, lambda *_: (print('saved'), exit(0)))\nprint('begun')\ntime.sleep(600)"
    )
    job, _ = RayJobs(address).submit(python(code, "long", folder=folder))
    with pytest.raises(TimeoutError, match="job long is"):
        job.result(0.0)
    token = os.environ["RAY_AUTH_TOKEN"]
    with Command(
        "jobs", "logs", "long", "--follow", "--address", address, cwd=folder, RAY_AUTH_TOKEN=token
    ) as following:
        while "begun" not in following.process.stdout.readline():
            assert following.process.poll() is None
        following.kill(signal.SIGINT)
        assert following.wait(30) == 130
        assert f"imaml jobs cancel long --address {address} stops it" in following.output
    assert job.status() is JobStatus.RUNNING and job.exit_code is None
    code, output = imaml_here("jobs", "cancel", "long", "--address", address, cwd=folder)
    assert code == 0 and "job long: STOPPED" in output, output
    assert "saved" in "".join(job.logs())
    with pytest.raises(CancelledError):
        job.result()
    code, output = imaml_here("jobs", "logs", "long", "--follow", "--address", address, cwd=folder)
    assert code == 130 and "job long was stopped" in output


def test_a_command_that_a_signal_ended_and_one_that_is_not_there(address, folder):
    jobs = RayJobs(address)
    killed, _ = jobs.submit(python("import os; os.kill(os.getpid(), 9)", "killed", folder=folder))
    lost, _ = jobs.submit(Submission("none", ("no-such-command",), "x", "/none", folder, {}))
    assert killed.result(60) == 137
    assert lost.result(60) == 127
    code, output = imaml_here("jobs", "logs", "none", "--follow", "--address", address, cwd=folder)
    assert code == 3 and "finds no imaml" in output


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "asks for a token and none is here; set RAY_AUTH_TOKEN"),
        ("wrong", "refuses the token of RAY_AUTH_TOKEN"),
    ],
)
def test_without_the_token_nothing_is_told_or_done(address, folder, monkeypatch, data, token, said):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    config = write_config(folder / "tiny.yaml", data)
    submit = ("submit", str(config), "--run-dir", "/none", *RUNS)
    for words in (submit, ("jobs", "list"), ("jobs", "logs", "x"), ("jobs", "cancel", "x")):
        code, output = imaml_here(*words, "--address", address, cwd=folder)
        assert code == 3
        assert said in output and output.count("\n") == 1, output


def test_the_token_may_be_in_a_file(cluster, address, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(cluster.env["RAY_AUTH_TOKEN"] + "\n")
    assert RayJobs(address).ray_version
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH: .*none cannot be read"):
        RayJobs(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / ".ray" / "auth_token"))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray's own client would let it win
    assert RayJobs(address).ray_version


def test_an_unknown_job_is_one_sentence(address, folder):
    for verb in ("status", "logs", "cancel"):
        code, output = imaml_here("jobs", verb, "nobody", "--address", address, cwd=folder)
        assert code == 2
        assert output.startswith("imaml: there is no job nobody on") and output.count("\n") == 1


def test_nothing_listens_beyond_the_loopback(cluster):
    processes = [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
    names = {process.name() for process in processes}
    assert {"raylet", "gcs_server"} <= names
    listening = {
        (process.name(), connection.laddr.ip)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of Ray, whose processes give way to all others of the machine
def test_a_cancelled_run_saves_its_state_and_the_same_command_goes_on(address, data, tmp_path, folder):
    config = write_config(tmp_path / "tiny.yaml", data, workers=2, steps=20000, checkpoint_every=10000)
    words = ("submit", str(config), "--run-dir", str(tmp_path / "run"), "--address", address, *RUNS)
    token = os.environ["RAY_AUTH_TOKEN"]
    with Command(*words, cwd=folder, RAY_AUTH_TOKEN=token) as submitted:
        seen = ""
        while "meta-training" not in seen:
            assert submitted.process.poll() is None, seen
            seen += submitted.process.stdout.readline()
        (id,) = re.findall(r"^job (\S+): submitted$", seen, re.MULTILINE)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 3):
            time.sleep(0.1)
        code, output = imaml_here("jobs", "cancel", id, "--address", address, cwd=folder)
        assert code == 0 and f"job {id}: STOPPED" in output, output
        assert submitted.wait(60) == 130
        assert f"job {id} was stopped" in submitted.output
    done = [int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(done) > 0
    code, output = imaml_here(*words, "--no-follow", cwd=folder)
    assert code == 0 and f"job {id}-2: submitted" in output
    starts, again = tmp_path / "run" / "starts.jsonl", RayJobs(address).job(f"{id}-2")
    deadline = time.monotonic() + 240
    while starts.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline and not again.done(), "".join(again.logs())
        time.sleep(0.2)
    assert json.loads(starts.read_text().splitlines()[-1])["step"] == max(done)
    assert imaml_here("jobs", "cancel", f"{id}-2", "--address", address, cwd=folder)[0] == 0


def test_what_cannot_be_reached_is_one_sentence(folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    closed = f"http://127.0.0.1:{free_port()}"
    config = write_config(folder / "tiny.yaml", data)
    code, output = imaml_here("submit", str(config), "--run-dir", "/none", *RUNS, "--address", closed, cwd=folder)
    assert code == 3
    assert f"nothing answers at {closed}" in output and output.count("\n") == 1
    with pytest.raises(InputError, match="credentials do not belong"):
        RayJobs("http://me:CANARY@head:8265")
    with pytest.raises(InputError, match="must be that of a Ray dashboard"):
        RayJobs("ray://head:10001")


def test_another_server_is_no_dashboard(moto, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="is no dashboard of a Ray cluster"):
        RayJobs(moto)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--run-dir", "runs/x"), "--run-dir: runs/x given, which lies in a folder of this machine"),
        (("--run-dir", "s3://me:CANARY@b/x"), "credentials do not belong in a URL"),
        (("--set", "data.url=data/omniglot"), "data.url: data/omniglot given, which lies in a folder"),
        (("--set", "validate.manifest=frozen.jsonl"), "validate.manifest: frozen.jsonl given, which lies in a folder"),
        (("--set", "run.backend=local"), "run.backend: local given"),
        (("--set", "run.device=auto"), "run.device: auto given"),
        (("--set", "run.stps=1"), "did you mean run.steps"),
        (("--working-dir", "none"), "--working-dir: none given, which is no folder"),
        (("--id", "a/b"), "--id: 'a/b' given"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(folder, data, arguments, said):
    """Nothing answers at the address, and nobody finds that out."""
    config = write_config(folder / "tiny.yaml", data)
    words = ("submit", str(config), "--run-dir", "/none", *RUNS, "--address", "http://127.0.0.1:1")
    code, output = imaml_here(*words, *arguments, cwd=folder)
    assert code == 2, output
    assert said in output and output.count("\n") == 1
    assert "CANARY" not in output


def test_the_commands_of_the_docs_do_what_they_say(cluster, address, folder):
    """As written, but for the address; object storage is not there, which is the job's trouble and not the submission's."""
    pages = [(ROOT / name).read_text().splitlines() for name in ("docs/jobs.md", "k8s/README.md")]
    lines = [line for page in pages for line in page if line.startswith("imaml ") and "--address" in line]
    assert [shlex.split(line)[1] for line in lines] == ["submit", "jobs", "jobs", "jobs", "jobs", "doctor", "submit"]
    for line in lines:
        words = shlex.split(re.sub(r"http://(head|localhost):8265", address, line))[1:]
        words = [str(ROOT / word) if word.startswith("pipelines/") else word for word in words]
        words += {"submit": ["--no-follow", "--set", "run.backend=ray"], "doctor": []}.get(words[0], [])
        words = [word for word in words if word != "--follow"]  # until storage has no patience left
        code, output = imaml_here(*words, cwd=folder)
        assert code == 0, f"{line}\n{output}"
    assert RayJobs(address).job("omniglot").done()
    (own,) = re.findall(r"^job (glyphs-\S+): submitted$", output, re.MULTILINE)
    code, output = imaml_here("jobs", "cancel", own, "--address", address, cwd=folder)
    assert code == 0 and f"job {own}: STOPPED" in output, output


def test_doctor_asks_the_cluster_and_its_dashboard(cluster, address, data, folder, monkeypatch):
    code, output = imaml_here("doctor", "--address", address, cwd=folder)
    assert code == 0 and "as here; the token is taken" in output
    config = write_config(folder / "tiny.yaml", data, workers=2, device="cpu", backend="ray")
    for workers, code in ((2, 0), (3, 3)):
        found, output = imaml(
            "doctor", str(config), "--set", f"run.workers={workers}", cwd=folder, COLUMNS="400", **cluster.env
        )
        assert found == code, output
    assert "room for 2" in output
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    code, output = imaml_here("doctor", "--address", address, cwd=folder)
    assert code == 3 and "refuses the token of RAY_AUTH_TOKEN" in output
