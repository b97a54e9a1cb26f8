"""A boto3 client for S3 or what speaks its language: made where it is used, made anew when credentials expire."""

from __future__ import annotations

import os
import threading
from typing import Any
from urllib.parse import urlsplit

from imaml_dist.errors import InputError, StorageError, brief
from imaml_dist.storage.options import StorageOptions

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class LazyClient:
    """The client of this process. Clients survive neither pickling nor forks, so a copy makes its own.

    Args:
        options: how storage is reached.
    """

    def __init__(self, options: StorageOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0

    def __reduce__(self) -> tuple[type[LazyClient], tuple[StorageOptions]]:
        return LazyClient, (self.options,)

    def get(self) -> Any:
        """The client.

        Raises:
            InputError: the endpoint is no URL.
            StorageError: the settings found in the environment cannot be used.
        """
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client, self._process = _made(self.options), os.getpid()
            return self._client

    def renew(self, stale: Any) -> None:
        """Go through the chain of credential providers once more, unless another thread just did."""
        with self._lock:
            if self._client is stale:
                self._client = None


def _made(options: StorageOptions) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    endpoint = options.endpoint
    if endpoint is not None and (urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname):
        raise InputError(f"storage.endpoint: {endpoint!r} is no URL; give one such as https://objects.example.org")
    own_server = endpoint is not None or any(os.environ.get(name) for name in ENDPOINT_VARIABLES)
    checksums = options.checksums
    if checksums == "auto":
        checksums = "when_required" if own_server else "when_supported"
    addressing: str = options.addressing
    if addressing == "auto" and own_server:
        addressing = "path"
    settings: dict[str, Any] = {
        "s3": {"addressing_style": addressing},
        # One attempt: trying again is ours, where it is counted and knows what has been read already.
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": options.connect_timeout,
        "read_timeout": options.read_timeout,
        "max_pool_connections": options.connections + 2,
        "tcp_keepalive": True,
        "request_checksum_calculation": checksums,
        "response_checksum_validation": checksums,
    }
    if options.anonymous:
        settings["signature_version"] = UNSIGNED
    region = options.region
    try:
        session = boto3.session.Session()
        if region is None and own_server:
            region = session.region_name or "us-east-1"  # such servers have none, but signatures need one
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=Config(**settings))
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"storage: no S3 client can be made from the settings of this environment ({brief(error)}); mend them"
        ) from error
