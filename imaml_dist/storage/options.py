"""How storage is reached: what a user may say about it. Nothing here is a secret; credentials come from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StorageOptions:
    """Of `s3://`; folders need none.

    Credentials are found where every S3 client finds them: environment, shared files and profiles, web identity, instance.

    Attributes:
        endpoint: URL of an S3-compatible server; None takes `AWS_ENDPOINT_URL_S3`, or Amazon's.
        region: None takes the environment's.
        addressing: of buckets, `path` or `virtual` (part of the host name); `auto` is path with an endpoint of one's own.
        anonymous: sign nothing, for public buckets.
        checksums: of requests, by the client library; `auto` is `when_required` with an endpoint of one's own, since many
            servers do not know the newer ones. Content is verified against the index in any case.
        retry_seconds: how long one operation may go on failing without progress, >= 0.
        connect_timeout: seconds. read_timeout: seconds without a byte.
        min_bytes_per_second: a slower answer is dropped and asked for again.
        connections: at once, >= 1.
    """

    endpoint: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    anonymous: bool = False
    checksums: Literal["auto", "when_required", "when_supported"] = "auto"
    retry_seconds: float = 60.0
    connect_timeout: float = 5.0
    read_timeout: float = 20.0
    min_bytes_per_second: float = 1024.0
    connections: int = 8
