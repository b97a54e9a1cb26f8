"""S3 as storage, in what sets it apart from a folder; the rest is in `test_contract`, faults are in `tests/faults`."""

import dataclasses
import hashlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import s3_server
from helpers.fault_proxy import FaultProxy

from imaml_dist.errors import ChangedError, InputError, MissingBucketError, StorageError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.patience import counters
from imaml_dist.storage.s3 import Bucket
from imaml_dist.storage.s3_client import LazyClient


@pytest.mark.parametrize(
    ("url", "clean"),
    [("s3://b", "s3://b"), ("s3://b/", "s3://b"), ("s3://b/p/q/", "s3://b/p/q"), ("s3://b/50%25", "s3://b/50%25")],
)
def test_urls(url, clean):
    assert open_storage(url).url == clean


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///p", "s3://b?canary", "s3://b/p?X-Amz-Signature=canary", "s3://b/p#canary"]
)
def test_bad_urls(url):
    with pytest.raises(InputError, match="not of the form s3://bucket/prefix; give a bucket") as refused:
        open_storage(url)
    assert "canary" not in str(refused.value)


def test_credentials_in_a_url():
    with pytest.raises(InputError, match="credentials do not belong in a URL") as refused:
        open_storage("s3://key:canary@bucket/p")
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://UPPER_case!", "s3://[bad", "s3://b:80"])
def test_a_name_that_no_bucket_can_have(url, aws):
    with pytest.raises(InputError, match=r"the request cannot be made .*check the URL"):
        open_storage(url, StorageOptions(endpoint="http://127.0.0.1:9")).read("a")


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "objects.example.org", "ftp://host", "http://", "http://[bad", "http://h:port"]
)
@pytest.mark.parametrize("source", ["storage.endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_an_endpoint_that_is_no_url(endpoint, source, aws, monkeypatch):
    options = StorageOptions(endpoint=endpoint if source == "storage.endpoint" else None)
    if source != "storage.endpoint":
        monkeypatch.setenv(source, endpoint)
    storage = open_storage("s3://bucket", options)
    with pytest.raises(InputError) as refused:
        storage.stat("a")
    assert str(refused.value).startswith(f"{source}: {endpoint!r} is no URL; give one such as https://")


def test_the_endpoint_of_the_environment(moto_bucket, monkeypatch):
    url, options = moto_bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options.endpoint)
    open_storage(url).write("a", b"1")
    assert open_storage(url, options).read("a") == b"1"


def test_a_missing_bucket_is_called_so(s3, aws):
    storage = open_storage("s3://no-such-bucket", StorageOptions(endpoint=s3))
    listed = lambda name: list(storage.names(name))  # noqa: E731
    for ask in (storage.stat, storage.read, lambda name: storage.write(name, b"1"), listed):
        with pytest.raises(MissingBucketError, match="the bucket does not exist; check its name and the endpoint"):
            ask("a")


@pytest.mark.ceph
def test_wrong_credentials(rgw, aws, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    storage = open_storage("s3://bucket", StorageOptions(endpoint=rgw))
    for ask in (storage.stat, storage.read, storage.remove):
        with pytest.raises(
            StorageError, match=r"does not accept these credentials \(SignatureDoesNotMatch\); check AWS_ACCESS_KEY_ID"
        ):
            ask("a")


def test_no_credentials(moto_bucket, monkeypatch):
    url, options = moto_bucket
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"no usable credentials were found .*storage.anonymous for a public bucket"):
        open_storage(url, options).read("a")


def test_anonymous_access(bucket, monkeypatch):
    url, options = bucket
    client = LazyClient(options).get()
    client.put_object(Bucket=url.removeprefix("s3://"), Key="public", Body=b"1", ACL="public-read")
    client.put_object(Bucket=url.removeprefix("s3://"), Key="private", Body=b"2")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    storage = open_storage(url, dataclasses.replace(options, anonymous=True))
    assert storage.read("public") == b"1"
    with pytest.raises(StorageError, match=r"access is refused \(403"):
        storage.read("private")


def test_a_copy_has_no_client_and_no_credentials_in_it(bucket):
    url, options = bucket
    storage = open_storage(url, options)
    storage.write("a", b"1")
    copied = pickle.dumps(storage)
    assert s3_server.SECRET_KEY.encode() not in copied
    assert pickle.loads(copied)._client._client is None
    assert pickle.loads(copied).read("a") == b"1"


def test_a_fork_makes_its_own_client_even_if_a_thread_was_making_one(bucket):
    url, options = bucket
    storage = Bucket(url, options)
    storage.write("a", b"1")
    own = storage._client.get()
    with storage._client._lock:  # as in another thread
        child = os.fork()
        if not child:
            try:
                os._exit(0 if storage.read("a") == b"1" and storage._client.get() is not own else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage._client.get() is own


def test_threads_share_one_client(moto_bucket, monkeypatch):
    url, options = moto_bucket
    storage, start = Bucket(url, options), threading.Barrier(8)

    def get(_: int) -> object:
        start.wait()
        return storage._client.get()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(get, range(8))))) == 1


@pytest.mark.parametrize("size", [1, 3_000_000])
def test_connections_are_used_again(bucket, size):
    url, options = bucket
    with FaultProxy(options.endpoint) as proxy:
        storage = Bucket(url, dataclasses.replace(options, endpoint=proxy.url))
        storage.write("a", b"x" * size)
        for _ in range(10):
            assert len(storage.read("a")) == size
            storage.stat("a")
        assert proxy.counts["connections"] == 1


def test_a_list_in_several_pages(bucket):
    url, options = bucket
    storage = Bucket(f"{url}/p", options)
    names = [f"{number}+ü" for number in range(5)]
    for name in names:
        storage.write(name, b"1")
    storage._client.get().meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 2}
    )
    before = counters.requests
    assert [name for name, _ in storage.names()] == names
    assert counters.requests - before == 3


def test_an_object_beyond_the_largest_is_refused(moto_bucket, tmp_path):
    url, options = moto_bucket
    with open(tmp_path / "large", "wb") as file:
        file.truncate((5 << 30) + 1)
    with pytest.raises(InputError, match="write smaller shards"):
        Bucket(url, options).write("a", tmp_path / "large")


def test_objects_of_several_parts(bucket):
    url, options = bucket
    name, parts = url.removeprefix("s3://"), [os.urandom(5 << 20), b"end"]
    client = LazyClient(options).get()
    upload = client.create_multipart_upload(Bucket=name, Key="a")["UploadId"]
    done = [
        {
            "PartNumber": i,
            "ETag": client.upload_part(Bucket=name, Key="a", UploadId=upload, PartNumber=i, Body=part)["ETag"],
        }
        for i, part in enumerate(parts, 1)
    ]
    client.complete_multipart_upload(Bucket=name, Key="a", UploadId=upload, MultipartUpload={"Parts": done})
    storage = Bucket(url, options)
    assert storage.read("a", version=storage.stat("a").version) == b"".join(parts)
    version = storage.write("a", b"new", only_if=storage.stat("a").version)
    assert storage.read("a", 1, 2, version=version) == b"e"


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
def test_checksums(bucket, checksums):
    url, options = bucket
    storage = Bucket(url, dataclasses.replace(options, checksums=checksums))
    storage.write("a", b"123")
    assert storage.read("a") == b"123"
    assert storage.read("a", 1) == b"23"


def test_what_was_asked_and_read_is_counted(moto_bucket):
    storage, before = Bucket(*moto_bucket), counters.snapshot()
    storage.write("a", b"12345")
    storage.read("a", 1, 4)
    after = counters.snapshot()
    assert {name: after[name] - before[name] for name in after} == {
        "requests": 2, "bytes_read": 3, "bytes_written": 5, "retries": 0, "seconds_waited": 0
    }  # fmt: skip


def test_a_server_that_does_not_know_if_match(moto_bucket):
    storage = Bucket(*moto_bucket)
    old = storage.write("a", b"old")
    storage.write("a", b"new")
    storage._client.get().meta.events.register(
        "provide-client-params.s3.GetObject", lambda params, **_: {k: v for k, v in params.items() if k != "IfMatch"}
    )
    with pytest.raises(ChangedError, match="changed since it was first looked at"):
        storage.read("a", version=old)


def test_what_was_written_is_known_by_its_content_where_the_etag_is_no_md5(moto_bucket, tmp_path):
    """As where a server encrypts: a write whose answer was lost is looked for."""
    url, options = moto_bucket
    bucket, other = open_storage(f"{url}/x", options), hashlib.md5(b"no content's").digest()
    bucket.write("a", b"12345")
    (tmp_path / "a").write_bytes(b"12345")
    found = bucket.stat("a")
    assert bucket._holds("a", found, b"12345", other) and bucket._holds("a", found, tmp_path / "a", other)
    assert not bucket._holds("a", found, b"12346", other) and not bucket._holds("a", found, b"1234", other)
