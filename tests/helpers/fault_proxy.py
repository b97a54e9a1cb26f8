"""An S3 server that misbehaves: a proxy on the loopback in front of a real one, which breaks chosen answers in chosen ways.

    with FaultProxy(moto, Fault("cut", every=2)) as proxy:
        Bucket("s3://name", StorageOptions(endpoint=proxy.url)).read("object")
        assert proxy.counts["cut"]

Requests pass as they are, with the Host that the client signed.
"""

import contextlib
import io
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Literal
from urllib.parse import parse_qs, urlsplit

PIECE = 1 << 14
BREAKS = ("cut", "reset", "stall", "trickle", "flip")
"""Faults of the body of an answer."""

ERRORS = {  # fault: status, S3's code
    "503": (503, "SlowDown"),
    "skew": (403, "RequestTimeTooSkewed"),
    "expired": (400, "ExpiredToken"),
}


@dataclass
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: `cut`, the connection is closed in mid-body; `reset`, and by an RST; `stall`, nothing more comes until the
            client hangs up; `trickle`, a byte at a time; `flip`, one bit is another; `bad_range`, the whole object instead of
            a range (the server must not verify signatures); `refuse`, closed before the request goes anywhere; `lose`, the
            request is carried out and its answer lost; `503`, SlowDown; `skew`, the server's clock is an hour behind;
            `expired`, ExpiredToken; `call`, `action` is called before the request goes on, unharmed.
        on: kind of request: GET (of an object), HEAD, PUT, LIST, DELETE, or all.
        every: which of them: each n-th, counted from 1.
        times: at most so often.
        after: bytes of the body that come before.
        pause: seconds between bytes that trickle.
        action: for `call`.
    """

    kind: Literal[
        "cut", "reset", "stall", "trickle", "flip", "bad_range", "refuse", "lose", "503", "skew", "expired", "call"
    ]
    on: str = "GET"
    every: int = 1
    times: float = float("inf")
    after: int = 50_000
    pause: float = 1.0
    action: Callable[[], object] = lambda: None
    _seen: int = field(default=0, repr=False)

    def strikes(self, kind: str) -> bool:
        """Whether this request of a kind is one to break; asked once for each."""
        if self.on not in ("all", kind):
            return False
        self._seen += 1
        return self._seen % self.every == 0 and self._seen // self.every <= self.times


class FaultProxy(ThreadingHTTPServer):
    """The proxy, as long as the context lasts.

    Args:
        server: URL of the server behind it.
        faults: the first one that strikes is done.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, server: str, *faults: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(server).netloc
        self.faults = faults
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.counts: Counter[str] = Counter()
        """Requests by kind, faults that were done by kind, and connections."""
        self.sent: Counter[str] = Counter()
        """Bytes of bodies of answers, by kind of request."""
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> "FaultProxy":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def fault(self, kind: str) -> Fault | None:
        """Count a request, and say what is to go wrong with it."""
        with self.lock:
            self.counts[kind] += 1
            return next((fault for fault in self.faults if fault.strikes(kind)), None)

    def count(self, counter: Counter[str], kind: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self.lock:
            counter[kind] += amount

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up; their connection is closed, and that is all."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def setup(self) -> None:
        # Small, so that what counts as sent is not far from what was received.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        self.server.count(self.server.counts, "connections")
        super().setup()

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        kind = self._kind()
        fault = self.server.fault(kind)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = fault.kind if fault else ""
        if name and name not in BREAKS:
            self.server.count(self.server.counts, name)
        if name == "refuse":
            self.close_connection = True
        elif name in ERRORS:
            self._answer_error(*ERRORS[name], late=3600 if name == "skew" else 0)
        else:
            if name == "call":
                fault.action()
            self._pass_on(kind, fault, body)

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

    def _kind(self) -> str:
        parts = urlsplit(self.path)
        is_list = self.command == "GET" and ("list-type" in parse_qs(parts.query) or parts.path.count("/") < 2)
        return "LIST" if is_list else self.command

    def _answer_error(self, status: int, code: str, late: float) -> None:
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Date", formatdate(time.time() - late, usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _pass_on(self, kind: str, fault: Fault | None, body: bytes) -> None:
        name = fault.kind if fault else ""
        upstream = HTTPConnection(self.server.upstream, timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for header, value in self.headers.items():
                if header.lower() not in ("expect", "connection") and (name, header.lower()) != ("bad_range", "range"):
                    upstream.putheader(header, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            if name == "lose":
                self.close_connection = True
                return
            self.send_response_only(answer.status, answer.reason)
            for header, value in answer.getheaders():
                if header.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(header, value)
            if answer.length is None:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(kind, answer, fault)

    def _send_body(self, kind: str, answer: HTTPResponse, fault: Fault | None) -> None:
        if fault is None or fault.kind not in BREAKS:
            self._send(kind, answer)
            return
        self._send(kind, answer, fault.after)
        if not (first := answer.read(1)):
            return  # too short for it
        self.server.count(self.server.counts, fault.kind)
        if fault.kind == "flip":
            self._send(kind, io.BytesIO(bytes([first[0] ^ 1])))
            self._send(kind, answer)
            return
        self.close_connection = True
        if fault.kind == "reset":
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.request.detach())  # close() would wait for the file objects made of it
        elif fault.kind == "stall":
            self.request.recv(1)
        elif fault.kind == "trickle":
            while first and not self.server.closing.wait(fault.pause):
                self._send(kind, io.BytesIO(first))
                first = answer.read(1)

    def _send(self, kind: str, source: IO[bytes], end: int | None = None) -> None:
        """Bytes of a source, all or to an end."""
        left = sys.maxsize if end is None else end
        while piece := source.read(min(PIECE, left)):
            self.server.count(self.server.sent, kind, len(piece))
            self.wfile.write(piece)
            left -= len(piece)
