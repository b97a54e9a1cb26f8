"""What several tests share: a small data set, written once, and kernels, compiled once."""

import os
import tempfile
from pathlib import Path

import pytest

# Before anything loads them. In a folder that outlives this run: twenty seconds are a long time.
os.environ.setdefault("IMAML_KERNELS", str(Path(tempfile.gettempdir()) / f"imaml-kernels-{os.getuid()}"))

from helpers.datasets import write_blobs


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A prepared data set of made images; not to be changed."""
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return folder
