"""Servers that are no S3, as one meets behind a wrong endpoint: one sentence says so, and at once."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from imaml_dist.errors import InputError, StorageError
from imaml_dist.storage.opening import open_storage
from imaml_dist.storage.options import StorageOptions

HTML = b"<html><body>It works</body></html>"


def answer(status: str, body: bytes = b"", **headers: str) -> tuple[bytes, bytes]:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "\r\n"]).encode(), body


TO = {"Location": "https://user:canary@host/bucket/a?canary", "Content_Length": "0"}
ANSWERS = {
    "301": (answer("301 Moved Permanently", **TO), "301 to https://host/bucket/a"),
    "302": (answer("302 Found", **TO), "302 to https://host/bucket/a"),
    "307": (answer("307 Temporary Redirect", **TO), "307 to https://host/bucket/a"),
    "308": (answer("308 Permanent Redirect", Content_Length="0"), "308 to nowhere"),
    "html": (answer("200 OK", HTML, Content_Length=str(len(HTML))), "no 'ETag'"),
    "no content": (answer("204 No Content", ETag="1"), "no 'ContentLength'"),
    "chunked": (answer("200 OK", b"1\r\na\r\n0\r\n\r\n", ETag="1", Transfer_Encoding="chunked"), "no 'ContentLength'"),
    "length": (answer("200 OK", ETag="1", Content_Length="many"), "ValueError: invalid literal for int"),
    "date": (
        answer("200 OK", b"a", ETag="1", Last_Modified="soon", Content_Length="1"),
        "ValueError: Invalid timestamp",
    ),
}


@pytest.fixture
def stranger(aws):
    """A server, and storage behind it; the server's `kind` is the answer it gives to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.requests += 1
            head, body = ANSWERS[self.server.kind][0]
            self.wfile.write(head if self.command == "HEAD" else head + body)

        do_HEAD = do_PUT = do_DELETE = do_GET

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.requests = 0
        server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield server, open_storage("s3://bucket", StorageOptions(endpoint=server.endpoint))
        server.shutdown()


def listed(storage):
    return lambda name: list(storage.names(name))


def written(storage):
    return lambda name: storage.write(name, b"1")


@pytest.mark.parametrize("kind", ANSWERS)
def test_reads_of_what_is_no_s3(stranger, kind):
    server, storage = stranger
    server.kind, began = kind, time.monotonic()
    for ask in (storage.stat, storage.read):
        with pytest.raises(StorageError) as refused:
            ask("a")
        told = str(refused.value)
        assert told.startswith(
            f"s3://bucket/a: the server at {server.endpoint} does not answer as S3 does ({ANSWERS[kind][1]}"
        )
        assert told.endswith("); check the endpoint") and "canary" not in told
    assert server.requests == 2
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["301", "302", "307", "308", "html"])
@pytest.mark.parametrize("ask", [listed, written])
def test_lists_and_writes_of_what_is_no_s3(stranger, kind, ask):
    server, storage = stranger
    server.kind = kind
    with pytest.raises(StorageError, match=r"the server at .* does not answer as S3 does \(.*\); check the endpoint"):
        ask(storage)("a")
    assert server.requests == 1


@pytest.mark.parametrize("proxy", [":::", "http://[canary", "http://host:canary"])
def test_a_proxy_without_an_address(aws, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    storage = open_storage("s3://bucket", StorageOptions(endpoint="http://objects.example.org"))
    with pytest.raises(InputError, match="a proxy or of the server cannot be read: check HTTP_PROXY") as refused:
        storage.read("a")
    assert "canary" not in str(refused.value)
