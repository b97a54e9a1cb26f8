"""What several tests share: a small data set, written once."""

from pathlib import Path

import pytest
from helpers.datasets import write_blobs


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A prepared data set of made images; not to be changed."""
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return folder
