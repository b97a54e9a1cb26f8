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
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type[LazyClient], tuple[StorageOptions]]:
        return LazyClient, (self.options,)

    def get(self) -> Any:
        """The client.

        Raises:
            InputError: the endpoint is no URL.
            StorageError: the settings found in the environment cannot be used.
        """
        if self._process != os.getpid():  # a fork, made perhaps while another thread held the lock
            self._lock, self._client, self._process = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._client is None:
                self._client = _made(self.options)
            return self._client

    def renew(self, stale: Any) -> None:
        """Go through the chain of credential providers once more, unless another thread just did."""
        with self._lock:
            if self._client is stale:
                self._client = None


def _check_endpoint(name: str, url: str) -> None:
    if "@" in url:  # not to be repeated, neither here nor in what a library says about it
        raise InputError(f"{name}: credentials do not belong in a URL; take them out, and set them in the environment")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{name}: {url!r} is no URL; give one such as https://objects.example.org")


def _made(options: StorageOptions) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    endpoints = {"storage.endpoint": options.endpoint} | {name: os.environ.get(name) for name in ENDPOINT_VARIABLES}
    for name, value in endpoints.items():
        if value:
            _check_endpoint(name, value)
    own_server = any(endpoints.values())
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
        client = session.client("s3", endpoint_url=options.endpoint, region_name=region, config=Config(**settings))
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"storage: no S3 client can be made from the settings of this environment ({brief(error)}); mend them"
        ) from error
    _check_endpoint("endpoint_url of the profile", client.meta.endpoint_url)
    client.meta.events.register_first("needs-retry.s3", _stay)
    return client


def _stay(request_dict: dict[str, Any], response: Any, **_: Any) -> None:
    """Keep the library from following a redirection that names no region, as S3's do: it would ask the same server for one,
    be redirected again, and so on without an end."""
    if response is not None and response[0].status_code in (301, 302, 307):
        found = response[1]
        if "x-amz-bucket-region" not in found["ResponseMetadata"]["HTTPHeaders"] and "Region" not in found.get(
            "Error", {}
        ):
            request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True
