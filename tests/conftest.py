"""What several tests share: a small data set, written once, kernels, compiled once, and S3 servers, started once."""

import functools
import os
import tempfile
import uuid
from pathlib import Path

import pytest

# Before anything loads them. In a folder that outlives this run: twenty seconds are a long time.
os.environ.setdefault("IMAML_KERNELS", str(Path(tempfile.gettempdir()) / f"imaml-kernels-{os.getuid()}"))

from helpers import s3_server
from helpers.datasets import write_blobs

SERVERS = ["moto", pytest.param("rgw", marks=pytest.mark.ceph)]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A prepared data set of made images; not to be changed."""
    folder = tmp_path_factory.mktemp("blobs")
    write_blobs(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(data):
    """The same, opened."""
    from imaml_dist.data.dataset import Dataset

    return Dataset(str(data))


@pytest.fixture(scope="session")
def moto():
    """The URL of a moto server."""
    with s3_server.moto_server() as server:
        yield server.url


@pytest.fixture(scope="session")
def rgw():
    """The URL of a RADOS Gateway."""
    if not s3_server.rgw_is_installed():
        pytest.skip("radosgw is not installed")
    with s3_server.rgw_server() as server:
        yield server.url


@pytest.fixture(scope="session", params=SERVERS)
def s3(request) -> str:
    """The URL of each S3 server."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def one_loader():
    """Clients whose library reads its service descriptions once, not for each."""
    with pytest.MonkeyPatch.context() as patch:
        import botocore.session as library

        patch.setattr(library, "create_loader", functools.cache(library.create_loader))
        yield


@pytest.fixture
def aws(one_loader, monkeypatch, tmp_path) -> None:
    """The environment of a client of the servers, and nothing of the user's own."""
    for name in os.environ.keys() - s3_server.clean_environment().keys():
        monkeypatch.delenv(name)
    for name, value in s3_server.environment(home=tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3, aws):
    """(URL, options) of a new bucket on each S3 server."""
    return new_bucket(s3)


@pytest.fixture
def moto_bucket(moto, aws):
    """(URL, options) of a new bucket on moto."""
    return new_bucket(moto)


def new_bucket(endpoint: str):
    """(URL, options) of a new bucket."""
    from imaml_dist.storage.options import StorageOptions
    from imaml_dist.storage.s3_client import LazyClient

    options, name = StorageOptions(endpoint=endpoint), f"test-{uuid.uuid4().hex}"
    LazyClient(options).get().create_bucket(Bucket=name)
    return f"s3://{name}", options
