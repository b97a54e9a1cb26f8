"""The commands that KubeRay makes of a manifest: Ray itself takes every one of their options."""

import click
import pytest
from helpers.manifests import a_rayjob
from ray.scripts.scripts import start

from cluster.reproduce import ray_starts
from cluster.resources import Needs
from imaml_dist.errors import InputError


def commands(needs=None, **options):
    return ray_starts(a_rayjob(needs or Needs(2, 2, 2), **options), "tiny-head-svc", "tiny-x7k2p")


def test_the_head_trains_nothing_and_workers_find_it():
    head, workers = commands()
    assert head.command[:3] == ("ray", "start", "--head")
    assert {"--num-cpus=0", "--dashboard-host=0.0.0.0", "--block"} <= set(head.command)
    assert {"--address=tiny-head-svc:6379", "--num-cpus=2", "--block"} <= set(workers.command)
    assert f"--memory={7 << 30}" in workers.command
    assert (workers.group, workers.pods) == ("workers", 2)
    assert head.environment["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert workers.environment["RAY_ADDRESS"] == "tiny-head-svc:6379"


def test_flags_stand_for_themselves_and_no_group_is_started_without_block():
    document = a_rayjob()
    head = document["spec"]["rayClusterSpec"]["headGroupSpec"]
    head["rayStartParams"] |= {
        "block": "false",
        "no-monitor": "false",
        "include-dashboard": "true",
        "disable-usage-stats": "true",
    }
    del head["template"]["spec"]["containers"][0]["resources"]["limits"]
    del head["rayStartParams"]["num-cpus"]
    command = ray_starts(document, "h", "c")[0].command
    assert {"--block", "--include-dashboard=true", "--disable-usage-stats", "--num-cpus=2"} <= set(command)
    assert not any("monitor" in word for word in command)


def test_gpus_and_the_autoscaler_are_told():
    head, workers = commands(Needs(4, 8, 1, gpus=1), workers_per_pod=4)
    assert "--no-monitor" in head.command
    assert "--num-gpus=4" in workers.command
    assert head.environment["RAY_enable_autoscaler_v2"] == "true"


def test_the_token_is_a_secret_of_the_cluster():
    for one in commands():
        assert one.environment["RAY_AUTH_MODE"] == "token"
        assert one.secrets["RAY_AUTH_TOKEN"] == "tiny-x7k2p/auth_token"
        assert one.secrets["AWS_SECRET_ACCESS_KEY"] == "imaml-s3/AWS_SECRET_ACCESS_KEY"
        assert not one.environment.keys() & one.secrets.keys()


def test_an_own_secret_with_the_token_is_taken():
    document = a_rayjob()
    document["spec"]["rayClusterSpec"]["authOptions"]["secretName"] = "mine"
    assert ray_starts(document, "h", "c")[0].secrets["RAY_AUTH_TOKEN"] == "mine/auth_token"
    del document["spec"]["rayClusterSpec"]["authOptions"]
    assert "RAY_AUTH_TOKEN" not in ray_starts(document, "h", "c")[0].secrets


@pytest.mark.parametrize("needs", [Needs(2, 2, 1), Needs(1, 4, 3, gpus=1)])
def test_ray_knows_every_option(needs):
    for one in commands(needs):
        start.make_context("ray start", list(one.command[2:]), resilient_parsing=False)
    with pytest.raises(click.UsageError):
        start.make_context("ray start", ["--nothing-like-it"])


def test_a_cluster_is_taken_as_a_job_is():
    document = a_rayjob()
    cluster = {"kind": "RayCluster", "spec": document["spec"]["rayClusterSpec"]}
    assert ray_starts(cluster, "h", "c") == ray_starts(document, "h", "c")
    with pytest.raises(InputError, match="brings no cluster"):
        ray_starts({"kind": "RayJob", "spec": {"clusterSelector": {"ray.io/cluster": "c"}}}, "h", "c")
