"""`imaml submit --k8s` and `imaml jobs --k8s` against a stand-in of Kubernetes' API that fails as the real one can."""

import json
import re
import signal
import threading
import time

import pytest
import yaml
from helpers import crds
from helpers.command import ROOT, Command, imaml_here
from helpers.kube_api import KubeApi
from helpers.manifests import IMAGE

from cluster import kube_jobs, rules

pytest.importorskip("kubernetes", reason="Kubernetes' client is not installed")

CONFIG = ROOT / "pipelines" / "configs" / "omniglot.yaml"
SUBMIT = ("submit", str(CONFIG), "--k8s", "--image", IMAGE, "--run-dir", "s3://imaml/runs/omniglot",
          "--set", "data.url=s3://imaml/data/omniglot", "--set", "run.device=cpu")  # fmt: skip
NAME = "omniglot"


@pytest.fixture
def api(monkeypatch, tmp_path):
    with KubeApi() as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path)))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-2b1c")
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(kube_jobs, "POLL_S", 0.1)
        yield made


def applied(api):
    return [path for method, path in api.requests if method == "PATCH"]


@pytest.mark.parametrize("fault", ["lose", "drop", 409, 429, 500, 503])
def test_whatever_happens_to_a_request_one_rayjob_results(api, tmp_path, fault):
    api.faults = [("PATCH", "rayjobs", fault), ("GET", "rayjobs", fault)]
    code, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert code == 0, output
    assert output.startswith(f"job {NAME}: submitted\n")
    assert not api.faults and len(applied(api)) == 2
    assert api.made == 1 and list(api.jobs) == [NAME]
    code, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert code == 0 and f"job {NAME}: there already (PENDING)" in output
    assert len(applied(api)) == 2, "nothing is applied again"


def test_what_is_applied_is_the_printed_manifest_and_its_identity(api, tmp_path):
    assert imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)[0] == 0
    code, printed = imaml_here(*SUBMIT, "--dry-run", cwd=tmp_path)
    assert code == 0
    job, wanted = api.jobs[NAME], yaml.safe_load(printed)
    assert re.fullmatch(r"[0-9a-f]{64}", job["metadata"].pop("annotations")[kube_jobs.IDENTITY])
    assert job["spec"] == wanted["spec"]
    assert {**wanted["metadata"], "creationTimestamp": "2026-11-29T05:00:00Z"} == job["metadata"]
    document = {key: value for key, value in job.items() if key != "status"}
    assert rules.broken(document) == crds.violations(document) == []
    assert "CANARY" not in json.dumps(api.jobs) + printed


def test_output_is_followed_through_lost_connections_and_a_retry(api, tmp_path):
    """The first cluster fails in the middle, KubeRay makes a second one, which ends the run."""
    lines = [f"line {n}\n" for n in range(12)]

    def operate():
        while NAME not in api.jobs:
            time.sleep(0.05)
        api.become(NAME, "Initializing")
        for n in range(6):
            api.output[f"{NAME}-ray-1"] = "".join(lines[: n + 1])
            api.become(NAME, "Running", "RUNNING")
            if n == 2:
                api.faults += [("GET", "/proxy/", "lose"), ("GET", "rayjobs", "drop"), ("GET", "rayjobs", 500)]
            time.sleep(0.4)
        time.sleep(3)
        api.become(NAME, "Retrying", "FAILED", "Job entrypoint command failed with exit code 3", attempt=1)
        time.sleep(2)
        api.output[f"{NAME}-ray-2"] = "".join(lines[6:])
        api.become(NAME, "Complete", "SUCCEEDED", "Job finished successfully.", attempt=2)

    operator = threading.Thread(target=operate)
    operator.start()
    code, output = imaml_here(*SUBMIT, cwd=tmp_path)
    operator.join()
    assert code == 0, output
    assert not api.faults, "all of them struck"
    assert re.findall(r"^line \d+$", output, re.MULTILINE) == [line.strip() for line in lines]
    assert "CANARY" not in output


def test_a_failed_job_passes_its_exit_code_on_and_is_tried_again(api, tmp_path):
    imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    api.become(NAME, "Failed", "FAILED", "Job entrypoint command failed with exit code 4, last available logs: ...")
    assert imaml_here("jobs", "logs", NAME, "--follow", "--k8s", cwd=tmp_path)[0] == 4
    code, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert code == 0 and f"job {NAME}-2: submitted" in output
    api.become(f"{NAME}-2", "Failed", "", "the job did not start within preRunningDeadlineSeconds")
    code, output = imaml_here("jobs", "logs", f"{NAME}-2", "--follow", "--k8s", cwd=tmp_path)
    assert code == 3 and "preRunningDeadlineSeconds" in output
    code, output = imaml_here("jobs", "list", "--k8s", cwd=tmp_path)
    assert code == 0 and output.count("FAILED") == 2


def test_another_configuration_of_the_same_name_is_refused(api, tmp_path):
    imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    code, output = imaml_here(*SUBMIT, "--no-follow", "--set", "run.steps=7", cwd=tmp_path)
    assert code == 2 and f"{NAME} is a RayJob of another configuration" in output
    assert api.made == 1


def test_ctrl_c_lets_the_job_go_on_and_cancel_deletes_it(api, tmp_path):
    with Command(*SUBMIT, cwd=tmp_path, KUBECONFIG=str(tmp_path / "kubeconfig.yaml")) as command:
        while NAME not in api.jobs:
            assert command.process.poll() is None
            time.sleep(0.05)
        api.output[f"{NAME}-ray-1"] = "begun\n"
        api.become(NAME, "Running", "RUNNING")
        while "begun" not in command.process.stdout.readline():
            assert command.process.poll() is None
        command.kill(signal.SIGINT)
        assert command.wait(30) == 130
        assert f"job {NAME} goes on" in command.output
        assert f"imaml jobs logs {NAME} --follow --k8s --namespace imaml" in command.output
    assert api.jobs[NAME]["status"]["jobStatus"] == "RUNNING"
    assert not [path for method, path in api.requests if method == "DELETE"]
    code, output = imaml_here("jobs", "status", NAME, "--k8s", cwd=tmp_path)
    assert code == 0 and "RUNNING" in output and "s3://imaml/runs/omniglot" in output
    api.faults = [("DELETE", "rayjobs", "lose")]
    code, output = imaml_here("jobs", "cancel", NAME, "--k8s", cwd=tmp_path)
    assert code == 0 and f"job {NAME}: STOPPED" in output, output
    assert not api.jobs


def test_a_job_that_somebody_deletes_while_it_is_followed_is_lost(api, tmp_path):
    with Command(*SUBMIT, cwd=tmp_path, KUBECONFIG=str(tmp_path / "kubeconfig.yaml")) as command:
        while NAME not in api.jobs:
            assert command.process.poll() is None
            time.sleep(0.05)
        del api.jobs[NAME]
        assert command.wait(30) == 3
        assert f"job {NAME} is no longer there" in command.output


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (401, 3, "refuses (as told: 401); log in again"),
        (403, 3, "refuses (as told: 403)"),
        (422, 2, "does not take the RayJob (as told: 422)"),
    ],
)
def test_what_will_not_pass_is_one_sentence(api, tmp_path, fault, code, said):
    api.faults = [("PATCH", "rayjobs", fault)]
    found, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert found == code
    assert said in output and output.count("\n") == 1


def test_a_server_that_stays_away_and_one_that_is_not_chosen(api, tmp_path, monkeypatch):
    monkeypatch.setattr(kube_jobs, "PATIENCE_S", 2.0)
    api.faults = [("GET", "rayjobs", "drop")] * 99
    code, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert code == 3 and "does not answer as it should" in output
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, output = imaml_here(*SUBMIT, "--no-follow", cwd=tmp_path)
    assert code == 3 and "no Kubernetes is chosen" in output and output.count("\n") == 1


def test_an_unknown_job_is_one_sentence(api, tmp_path):
    code, output = imaml_here("jobs", "cancel", "nobody", "--k8s", cwd=tmp_path)
    assert code == 2 and output.startswith("imaml: there is no RayJob nobody in namespace imaml; imaml jobs list --k8s")
