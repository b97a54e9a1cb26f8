"""A bucket and prefix of S3, or of a server that speaks its language, as storage.

The client library does not try again once the body of an answer has begun, so reading goes on where it stopped: by range,
and only if the object is still the same (`If-Match`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from imaml_dist.errors import ChangedError, ImamlError, InputError, MissingError, StorageError
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.patience import Patience, counters
from imaml_dist.storage.protocol import ABSENT, Stat
from imaml_dist.storage.s3_client import LazyClient
from imaml_dist.storage.s3_errors import (
    FAULTS,
    STRANGE,
    Verdict,
    may_quote_secrets,
    status_of,
    told,
    translated,
    verdict,
)

PIECE = 1 << 20
"""Bytes read at once."""

LARGEST_PUT = 5 << 30
"""Bytes of one object that S3 takes in one request."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Bucket:
    """`Storage` below `s3://bucket/prefix`.

    Args:
        url: without credentials in it.
        options: how it is reached.

    Raises:
        InputError: no bucket in the URL, or credentials.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket:
            raise InputError("credentials do not belong in a URL; take them out, and set them in the environment")
        if scheme != "s3" or not bucket or set("?#") & set(rest):  # behind which there may be a signature
            raise InputError(
                f"{re.split('[?#]', url)[0]}: not of the form s3://bucket/prefix; give a bucket, and nothing behind the prefix"
            )
        self.options = options
        self.bucket, self._prefix = bucket, prefix.strip("/")
        self.url = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self._client = LazyClient(options)

    def stat(self, name: str) -> Stat:
        """See `Storage`."""

        def head(client: Any) -> Stat:
            try:
                found = client.head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if status_of(error) not in (400, 401, 403, 404):
                    raise
                # An answer to HEAD has no body to say why; one to GET has.
                client.get_object(Bucket=self.bucket, Key=self._key(name), Range="bytes=0-0")["Body"].close()
                raise
            return Stat(int(found["ContentLength"]), str(found["ETag"]))

        return self._patiently(name, head)

    def read(self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None) -> bytes:
        """See `Storage`."""
        return b"".join(self.stream(name, begin, end, version=version))

    def stream(
        self, name: str, begin: int = 0, end: int | None = None, *, version: str | None = None
    ) -> Iterator[bytes]:
        """See `Storage`."""
        patience = Patience(self.options.retry_seconds)
        while end is None or begin < end:
            answer, end = self._patiently(name, lambda client: self._get(client, name, begin, end, version), patience)  # noqa: B023
            version = str(answer["ETag"])
            try:
                with closing(answer["Body"]) as body:
                    for piece in self._pieces(body, end - begin, patience):
                        begin += len(piece)
                        counters.add(bytes_read=len(piece))
                        yield piece
            except FAULTS as error:
                self._wait(name, error, patience)

    def write(self, name: str, content: bytes | Path, *, only_if: str | None = None) -> str:
        """See `Storage`."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > LARGEST_PUT:
            raise InputError(
                f"{self._where(name)}: {size} bytes, but one object may have {LARGEST_PUT}; write smaller shards"
            )
        condition = (
            {} if only_if is None else {"IfNoneMatch": "*"} if only_if == ABSENT else {"IfMatch": only_if.strip('"')}
        )
        md5, patience = _md5(content), Patience(self.options.retry_seconds)

        def put(client: Any) -> str:
            with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as body:
                answer = client.put_object(
                    Bucket=self.bucket,
                    Key=self._key(name),
                    Body=body,
                    ContentLength=size,
                    ContentMD5=base64.b64encode(md5).decode(),
                    **condition,
                )
            return str(answer["ETag"])

        try:
            version = self._patiently(name, put, patience)
        except (ChangedError, MissingError) as error:
            if isinstance(error, MissingError) and "IfMatch" not in condition:
                raise
            # A first try may have been carried out though its answer got lost: then what is there is ours.
            found = self.stat(name) if patience.total_failures and isinstance(error, ChangedError) else None
            if found is None or not self._holds(name, found, content, md5):
                what = "is there already" if only_if == ABSENT else "is not what it was any more"
                raise ChangedError(f"{self._where(name)} {what}; another writer was faster") from error
            version = found.version
        counters.add(bytes_written=size)
        return version

    def _holds(self, name: str, found: Stat, content: bytes | Path, md5: bytes) -> bool:
        """Whether an object has this content. A server that encrypts has other ETags than the MD5."""
        if found.version.strip('"') == md5.hex():
            return True
        ours = content.read_bytes() if isinstance(content, Path) else content
        return found.size == len(ours) and self.read(name, version=found.version) == ours

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `Storage`."""
        start = self._key("")
        request: dict[str, Any] = {"Bucket": self.bucket, "Prefix": start + prefix}

        def page(client: Any) -> tuple[list[tuple[str, int]], str]:
            answer = client.list_objects_v2(**request)
            found = [(str(it["Key"])[len(start) :], int(it["Size"])) for it in answer.get("Contents", ())]
            return found, answer["NextContinuationToken"] if answer["IsTruncated"] else ""

        while True:
            found, further = self._patiently(prefix, page)
            yield from found
            if not further:
                return
            request["ContinuationToken"] = further

    def remove(self, name: str) -> None:
        """See `Storage`."""
        self._patiently(name, lambda client: client.delete_object(Bucket=self.bucket, Key=self._key(name)))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _get(
        self, client: Any, name: str, begin: int, end: int | None, version: str | None
    ) -> tuple[dict[str, Any], int]:
        """An answer, if it is what was asked for, and the byte behind its last one."""
        request: dict[str, Any] = {"Bucket": self.bucket, "Key": self._key(name)}
        if begin or end is not None:
            request["Range"] = f"bytes={begin}-" + ("" if end is None else str(end - 1))
        if version is not None:
            request["IfMatch"] = version
        answer = client.get_object(**request)
        try:
            return answer, self._checked_end(name, answer, begin, end, version)
        except Exception:
            answer["Body"].close()
            raise

    def _checked_end(self, name: str, answer: dict[str, Any], begin: int, end: int | None, version: str | None) -> int:
        found, last = str(answer.get("ContentRange", "")), begin + int(answer["ContentLength"])
        if version not in (None, str(answer["ETag"])):  # of a server that does not know If-Match
            raise ChangedError(f"{self._where(name)} was changed since it was first looked at; read it again")
        if (begin or end is not None) and not found.startswith(f"bytes {begin}-"):
            raise StorageError(
                f"{self._where(name)}: bytes from {begin} on were asked for, and the server answers with {found or 'the whole object'}; "
                "it cannot be used without ranged reads"
            )
        if end is not None and last != end:
            raise ChangedError(f"{self._where(name)} ends at byte {last}, {end} was asked for")
        return last

    def _pieces(self, body: Any, size: int, patience: Patience) -> Iterator[bytes]:
        """The body as it arrives.

        Raises:
            OSError: it ends before its time, or comes more slowly than the options allow; and whatever a connection raises.
        """
        raw = body._raw_stream  # botocore's own read() waits until all that was asked for is there, however slowly
        got, spent = 0, 0.0
        while size:
            began = time.monotonic()
            piece = raw.read1(min(PIECE, size))
            spent += time.monotonic() - began
            if not piece:
                raise ConnectionError(f"the answer ended {size} bytes before its end")
            size -= len(piece)
            got += len(piece)
            if got >= self.options.min_bytes_per_second * spent:
                patience.progress()
            elif spent > self.options.read_timeout:
                raise TimeoutError(
                    f"{got} bytes in {spent:.0f} seconds are fewer than {self.options.min_bytes_per_second:.0f} a second"
                )
            if spent > self.options.read_timeout:
                got, spent = 0, 0.0
            given = time.monotonic()
            yield piece
            patience.excuse(time.monotonic() - given)

    def _patiently(self, name: str, ask: Callable[[Any], T], patience: Patience | None = None) -> T:
        """Ask until there is an answer, or the budget is spent, or asking again cannot help."""
        patience, renewed = patience or Patience(self.options.retry_seconds), False
        while True:
            client = self._client.get()
            counters.add(requests=1)
            try:
                return ask(client)
            except (*FAULTS, *STRANGE) as error:
                decision = verdict(error)
                if decision is Verdict.RENEW and not renewed:
                    renewed = True
                    self._client.renew(client)
                elif decision is Verdict.AGAIN:
                    self._wait(name, error, patience)
                else:
                    raise self._translated(name, error) from None if may_quote_secrets(error) else error

    def _translated(self, name: str, error: BaseException) -> ImamlError:
        return translated(error, self._where(name), self._client.get().meta.endpoint_url)

    def _wait(self, name: str, error: BaseException, patience: Patience) -> None:
        """Before the next try, if the budget lasts for one."""
        if verdict(error) is not Verdict.AGAIN:
            raise self._translated(name, error) from error
        if not patience.wait():
            raise StorageError(
                f"{self._where(name)}: gave up after {patience.failures} failures in {patience.spent:.0f} seconds without progress "
                f"(storage.retry_seconds is {self.options.retry_seconds:g}), the last one {told(error)}; check the endpoint and the "
                "network, and run the command again"
            ) from error
        if patience.failures in (1, 10, 100):
            _log.warning("%s: %s; trying again (%d)", self._where(name), told(error), patience.failures)


def _md5(content: bytes | Path) -> bytes:
    """By which the server sees that it got what was sent."""
    if isinstance(content, bytes):
        return hashlib.md5(content, usedforsecurity=False).digest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
