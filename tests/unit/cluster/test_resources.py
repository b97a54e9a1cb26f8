"""How many workers a cluster has room for: whole ones, each on one node, and each on one GPU."""

import pytest

from cluster.resources import room


@pytest.mark.parametrize(
    ("nodes", "worker", "fit"),
    [
        ([{"CPU": 4.0}], {"CPU": 1.0}, 4),
        ([{"CPU": 4.0}], {"CPU": 3.0}, 1),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),
        ([{"CPU": 1.0}, {"memory": 8.0}], {"CPU": 2.0}, 0),
        ([], {"CPU": 1.0}, 0),
        ([{"CPU": 16.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 1.0}, 2),
        ([{"CPU": 16.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.5}, 4),
        ([{"CPU": 16.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.4}, 4),
        ([{"CPU": 16.0, "GPU": 1.0}], {"CPU": 1.0, "GPU": 1 / 3}, 3),
        ([{"CPU": 3.0, "GPU": 4.0}], {"CPU": 1.0, "GPU": 0.25}, 3),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], {"CPU": 1.0, "GPU": 1.0}, 1),
    ],
)
def test_room_is_counted_in_whole_workers(nodes, worker, fit):
    assert room(nodes, worker) == fit
