"""RayJobs made of experiments: 200 generated ones are valid by every check there is, and mistakes are told apart."""

import string

import pytest
import yaml
from helpers import crds, pod_security
from helpers.manifests import IMAGE, a_rayjob
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cluster import rules
from cluster.kube_options import KubeOptions, load_kube_options
from cluster.kuberay import CONFIG_KEY, NAME_LENGTH, Run, job_name, rayjob, to_yaml
from cluster.resources import Needs
from imaml_dist.errors import ConfigError, InputError

NAMES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=80).filter(lambda s: s[0].isalnum())
LABELS = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20)


PLAIN = st.text(max_size=20).filter(lambda text: "@" not in text)


@st.composite
def runs(draw):
    each = draw(st.integers(1, 8))
    fewest = draw(st.integers(1, 40))
    queue = draw(st.none() | LABELS)
    most = fewest if queue else fewest + draw(st.integers(0, 20))
    needs = Needs(each * fewest, each * most, draw(st.sampled_from([1.0, 2.0, 8.0])), draw(st.sampled_from([0.0, 1.0])))
    options = KubeOptions(
        image=draw(st.sampled_from([IMAGE, "imaml@sha256:" + "0" * 64, "host:5000/a/b:v1"])),
        namespace=draw(LABELS),
        workers_per_pod=each,
        memory=draw(st.sampled_from(["256Mi", "6Gi", "1.5G", "512Gi"])),
        env=draw(st.dictionaries(st.sampled_from(["AWS_REGION", "MLFLOW_TRACKING_URI"]), PLAIN)),
        secrets=draw(st.dictionaries(st.sampled_from(["AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN"]), st.just("imaml-s3/key"))),
        node_selector=draw(st.dictionaries(LABELS, LABELS, max_size=2)),
        tolerations=draw(st.lists(st.just({"key": "spot", "operator": "Exists", "effect": "NoSchedule"}), max_size=1)),
        retries=draw(st.integers(0, 10)),
        max_seconds=draw(st.none() | st.integers(60, 10**6)),
        keep_seconds=draw(st.integers(0, 604800)),
        keep_failed_seconds=draw(st.integers(0, 604800)),
        queue=queue,
    )  # fmt: skip
    config = draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=200))
    return Run(draw(NAMES), ("imaml", "train", draw(st.text(max_size=20))), f"name: x\n# {config}\n", needs), options


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(runs())
def test_generated_runs_are_valid(made):
    run, options = made
    document = rayjob(run, options)
    assert rules.broken(document) == []
    assert pod_security.refused(document) == []
    assert yaml.safe_load(to_yaml(document)) == document
    assert crds.violations(document) == []


def test_the_configuration_arrives_as_it_is():
    document = rayjob(
        Run("tiny", ("x",), "name: tiny\nmodel: {kind: 'a:b'}  # ünicode: {}\n", Needs(1, 1, 1)),
        KubeOptions(image=IMAGE),
    )
    head = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (volume,) = [v for v in head["spec"]["volumes"] if v["name"] == "config"]
    assert volume["downwardAPI"]["items"][0]["fieldRef"]["fieldPath"] == f"metadata.annotations['{CONFIG_KEY}']"
    assert head["metadata"]["annotations"][CONFIG_KEY].endswith("# ünicode: {}\n")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(NAMES, NAMES)
def test_job_names_are_labels_and_differ_where_names_do(one, other):
    assume(one != other)
    assert (
        rules.broken(
            {
                "kind": "RayJob",
                "metadata": {"name": job_name(one)},
                "spec": {"clusterSelector": {"ray.io/cluster": "c"}},
            }
        )
        == []
    )
    assert len(job_name(one)) <= NAME_LENGTH
    assert job_name(one) == job_name(one)
    assert job_name(one) != job_name(other)


@pytest.mark.parametrize(
    ("name", "job"), [("omniglot-5w1s", "omniglot-5w1s"), ("A.b_C", "a-b-c-ea83a6"), ("5way", "run-5way-41c8db")]
)
def test_job_names_stay_as_they_are_between_versions(name, job):
    assert job_name(name) == job


def test_what_a_retry_needs():
    spec = a_rayjob(retries=5)["spec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["backoffLimit"] == 5
    assert "--run-dir s3://b/runs/tiny" in spec["entrypoint"]
    assert "--fresh" not in spec["entrypoint"]
    assert spec["preRunningDeadlineSeconds"] > 0


def test_what_the_cluster_is_like():
    cluster = a_rayjob(Needs(4, 16, 2, gpus=1), workers_per_pod=4, memory="10Gi", shm="2Gi")["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "43008Mi", "nvidia.com/gpu": "4"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert group["rayStartParams"]["object-store-memory"] == str(1 << 30), "half of /dev/shm"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert "Probe" not in to_yaml(a_rayjob()), "KubeRay's own probes know its versions of Ray"


def test_secrets_are_named_and_not_held(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "CANARY-51aa")
    text = to_yaml(a_rayjob(secrets={"AWS_SECRET_ACCESS_KEY": "imaml-s3/secret"}))
    assert "CANARY" not in text
    assert "key: secret" in text
    assert "imaml-s3" in text


def test_kueue_decides_when_a_run_of_one_size_begins():
    document = a_rayjob(queue="team-a")
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert document["spec"]["suspend"] is document["spec"]["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in document["spec"]
    with pytest.raises(InputError, match=r"run.workers: 1 to 2 given, but Kueue"):
        a_rayjob(Needs(1, 2, 1), queue="team-a")


def test_workers_fill_pods():
    with pytest.raises(InputError, match=r"workers_per_pod: 4 given, but run.workers = 6 is not a multiple"):
        a_rayjob(Needs(4, 6, 1), workers_per_pod=4)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("image", "imaml", "must have a tag other than latest"),
        ("image", "imaml:latest", "must have a tag other than latest"),
        ("image", "host:5000/imaml", "must have a tag other than latest"),
        ("image", "no spaces:1", "image: 'no spaces:1' given"),
        ("namespace", "Upper", "namespace: 'Upper' given"),
        ("retries", -1, "retries: -1 given"),
        ("retries", "3", "retries: '3' given, should be a valid integer"),
        ("memory", "6 GB", "must be a Kubernetes quantity"),
        ("memory", "1Mi", "must be at least 256Mi"),
        ("shm", "7Gi", "may be half of head_memory"),
        ("replicas", 3, "is not a known field"),
        ("env", {"PGPASSWORD": "CANARY"}, "keep it in a Secret"),
        ("env", {"MLFLOW_TRACKING_URI": "http://a:b@c"}, "URL with credentials"),
        ("secrets", {"AWS_SECRET_ACCESS_KEY": "CANARY-77"}, "does not name a Secret"),
        ("secrets", {"AWS_REGION": "a/b"}, "stands under `secrets` as well"),
        ("tolerations", [{"key": 3}], "tolerations.0.key: 3 given"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_one_sentence(tmp_path, field, value, said):
    path = tmp_path / "kube.yaml"
    raw = {"image": IMAGE, "env": {"AWS_REGION": "eu"}, field: value}
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_kube_options(path, {})
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "CANARY" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a", "a: [", "\xff", "&a [*a]", "!!python/object:os.system {}"])
def test_files_that_are_no_options_are_refused(tmp_path, text):
    path = tmp_path / "kube.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_kube_options(path, {})
    with pytest.raises(ConfigError, match="is no file of options"):
        load_kube_options(tmp_path / "none", {})


def test_what_is_given_beside_the_file_wins(tmp_path):
    path = tmp_path / "kube.yaml"
    path.write_text(f"image: {IMAGE}\nretries: 1\n")
    assert load_kube_options(path, {"retries": 7}).retries == 7
    assert load_kube_options(path, {}).retries == 1
    with pytest.raises(ConfigError, match="image is missing"):
        load_kube_options(None, {})
