"""Whether a run fits into a cluster, and the sentence that says why not."""

import pytest

from cluster.resources import Needs, misfit, quantity
from imaml_dist.errors import ConfigError

GIB = 2.0**30


def test_what_fits_is_not_talked_about():
    assert misfit(Needs(2, 8, 1), [{"CPU": 2.0}]) is None
    assert misfit(Needs(2, 2, 1, gpus=1), [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]) is None


@pytest.mark.parametrize(
    ("needs", "nodes", "said"),
    [
        (
            Needs(3, 3, 2),
            [{"CPU": 4.0}],
            "the run needs 3 workers of 2 CPU each, but the cluster's 1 node (4 CPU in all) have room for 2: CPU fall short",
        ),
        (
            Needs(2, 2, 1, gpus=1),
            [{"CPU": 64.0}],
            "the run needs 2 workers of 1 CPU, 1 GPU each, but none of the cluster's 1 node (64 CPU, 0 GPU in all) has room for even one",
        ),
        (
            Needs(1, 1, 4),
            [{"CPU": 2.0}, {"CPU": 2.0}],
            "the run needs 1 worker of 4 CPU each, but none of the cluster's 2 nodes (4 CPU in all) has room for even one",
        ),
        (Needs(1, 1, 1), [], "but the cluster has no nodes"),
        (
            Needs(2, 2, 2, gpus=1),
            [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}],
            "have room for 1: no node has all kinds together",
        ),
        (Needs(2, 2, 1, memory=6 * GIB), [{"CPU": 8.0, "memory": 8 * GIB}], "room for 1: memory fall short"),
    ],
)
def test_what_does_not_fit_is_one_sentence(needs, nodes, said):
    sentence = misfit(needs, nodes)
    assert said in sentence
    assert "\n" not in sentence
    assert ("; lower run.workers" in sentence) == bool(nodes)


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("2", 2), (3, 3), ("8Gi", 8 * GIB), ("1.5G", 1.5e9), ("64Mi", 2**26)]
)
def test_quantities(text, value):
    assert quantity(text, "memory") == value


@pytest.mark.parametrize("text", ["", "8 Gi", "8gb", "-1", "1e3Q", "Gi"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ConfigError, match=r"memory: .* must be a Kubernetes quantity"):
        quantity(text, "memory")
