"""However storage fails, no secret gets into a message, a record or a traceback."""

import dataclasses
import logging
import traceback

import pytest
from helpers import s3_server
from helpers.fault_proxy import Fault, FaultProxy

from imaml_dist.errors import ImamlError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import ABSENT

CANARIES = {"AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_SESSION_TOKEN": "canary-token"}
KINDS = ["cut", "reset", "stall", "refuse", "lose", "503", "skew", "expired", "bad_range"]
HASTY = {"retry_seconds": 0.2, "connect_timeout": 0.3, "read_timeout": 0.2}


@pytest.fixture(autouse=True)
def canaries(aws, monkeypatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def told(caplog, ask, *args, **named) -> str:
    """All that becomes known of an error."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "imaml_dist")
    with pytest.raises(ImamlError) as caught:
        ask(*args, **named)
    error = caught.value
    records = [logging.Formatter().format(record) for record in caplog.records]
    return "\n".join([str(error), repr(error), *traceback.format_exception(error), *records])


@pytest.mark.parametrize("kind", KINDS)
def test_faults(moto_bucket, caplog, kind):
    url, options = moto_bucket
    open_storage(url, options).write("a", bytes(1000))
    with FaultProxy(options.endpoint, Fault(kind, on="all", after=0)) as proxy:
        storage = open_storage(url, dataclasses.replace(options, endpoint=proxy.url, **HASTY))
        assert "canary" not in told(caplog, storage.read, "a", 1)
        if kind not in ("cut", "reset", "stall", "bad_range"):
            assert "canary" not in told(caplog, storage.stat, "a")
            assert "canary" not in told(caplog, storage.write, "a", b"1")


def test_refusals(moto_bucket, caplog):
    storage = open_storage(*moto_bucket)
    version = storage.write("a", b"1")
    storage.write("a", b"2")
    for ask in (
        lambda: storage.read("b"),
        lambda: storage.read("a", 5),
        lambda: storage.read("a", version=version),
        lambda: storage.write("a", b"3", only_if=ABSENT),
        lambda: open_storage("s3://no-such-bucket", storage.options).read("a"),
        lambda: open_storage("s3://no:bucket", storage.options).read("a"),
    ):
        assert "canary" not in told(caplog, ask)


@pytest.mark.ceph
def test_credentials_that_a_server_refuses(rgw, caplog):
    storage = open_storage("s3://bucket", StorageOptions(endpoint=rgw))
    for ask in (storage.read, storage.stat, storage.remove):
        assert "canary" not in told(caplog, ask, "a")


def test_a_server_that_is_not_there(caplog):
    endpoint = f"http://127.0.0.1:{s3_server.free_port()}"
    assert "canary" not in told(caplog, open_storage("s3://b", StorageOptions(endpoint=endpoint, **HASTY)).read, "a")


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"])
def test_credentials_with_a_line_break(moto, monkeypatch, caplog, name):
    monkeypatch.setenv(name, "canary\n")
    storage = open_storage("s3://bucket", StorageOptions(endpoint=moto))
    for ask in (storage.read, storage.stat):
        text = told(caplog, ask, "a")
        assert "canary" not in text
        assert "look for line breaks in the credentials" in text


@pytest.mark.parametrize("source", ["storage.endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize("endpoint", ["http://user:canary@127.0.0.1:9", "user:canary@host", "http://canary@[bad"])
def test_an_endpoint_with_a_password(monkeypatch, caplog, source, endpoint):
    if source != "storage.endpoint":
        monkeypatch.setenv(source, endpoint)
    options = StorageOptions(endpoint=endpoint if source == "storage.endpoint" else None, **HASTY)
    text = told(caplog, open_storage("s3://bucket", options).read, "a")
    assert "canary" not in text
    assert text.startswith(f"{source}: credentials do not belong in a URL")


def test_an_endpoint_with_a_password_in_a_profile(monkeypatch, caplog, tmp_path):
    (tmp_path / "aws-config").write_text("[default]\nendpoint_url = http://user:canary@127.0.0.1:9\n")
    text = told(caplog, open_storage("s3://bucket", StorageOptions(region="us-east-1", **HASTY)).read, "a")
    assert "canary" not in text
    assert text.startswith("endpoint_url of the profile: credentials do not belong in a URL")


def test_a_proxy_with_a_password(monkeypatch, caplog):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:canary@127.0.0.1:{s3_server.free_port()}")
    options = StorageOptions(endpoint="http://objects.example.org", **HASTY)
    assert "canary" not in told(caplog, open_storage("s3://bucket", options).read, "a")


def test_urls(caplog):
    for url in ("s3://user:canary@bucket/a", "s3://bucket/a?X-Amz-Signature=canary", "gs://user:canary@bucket/a"):
        assert "canary" not in told(caplog, open_storage, url)


def test_representations(moto_bucket):
    storage = open_storage(*moto_bucket)
    storage.write("a", b"1")
    assert "canary" not in f"{storage!r} {vars(storage)} {storage.options}"
