"""What an S3 answer means: try again, renew credentials, or one sentence for the user. Nothing secret gets into a message."""

from __future__ import annotations

import http.client
import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError

from imaml_dist.errors import (
    ChangedError,
    ImamlError,
    InputError,
    MissingBucketError,
    MissingError,
    StorageError,
    brief,
)
from imaml_dist.storage.local import without_secrets

FAULTS = (BotoCoreError, ClientError, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
"""What asking for an object may raise."""

STRANGE = (KeyError, ValueError, RecursionError, ResponseParserError)
"""What it raises where an answer is not S3's: it lacks a field, has one that cannot be read, or redirects without an end."""

_BROKEN = (HTTPClientError, NoConnectionError, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError)
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
_BUSY = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "RequestTimeout",
    "RequestTimeoutException",
    "InternalError",
    "ServiceUnavailable",
    "ConditionalRequestConflict",
    "OperationAborted",
    "BadDigest",
}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}


class Verdict(Enum):
    """What to do about a fault."""

    AGAIN = 1
    RENEW = 2
    FINAL = 3


def verdict(error: BaseException) -> Verdict:
    """Whether trying again may help."""
    if isinstance(error, ClientError):
        if code_of(error) in _EXPIRED:
            return Verdict.RENEW
        return (
            Verdict.AGAIN if code_of(error) in _BUSY or status_of(error) in (429, *range(500, 600)) else Verdict.FINAL
        )
    return Verdict.AGAIN if isinstance(error, _BROKEN) and not may_quote_secrets(error) else Verdict.FINAL


def may_quote_secrets(error: BaseException) -> bool:
    """Whether this is about a header or an address that cannot be used, and quotes it: it may be one with credentials."""
    return isinstance(error, HTTPClientError) and isinstance(error.kwargs.get("error"), ValueError)


def _is_about_a_header(error: HTTPClientError) -> bool:
    reason = error.kwargs["error"]  # a plain ValueError of http.client, or of encoding what it is to send
    return isinstance(reason, UnicodeError) or str(reason).startswith("Invalid header")


def code_of(error: ClientError) -> str:
    """S3's own name of an error, or the number of the HTTP status where there is no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def told(error: BaseException) -> str:
    """A fault in a few words."""
    if isinstance(error, KeyError):
        return f"no {error}"
    if isinstance(error, ClientError):
        return f"{status_of(error)} {code_of(error)}" if code_of(error) != str(status_of(error)) else code_of(error)
    return brief(error)


def translated(
    error: BaseException, where: str, server: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> ImamlError:
    """The project's own error for a fault that is final."""
    if isinstance(error, _NO_CREDENTIALS):
        return StorageError(
            f"{where}: no usable credentials were found ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or a profile, or storage.anonymous for a public bucket"
        )
    if may_quote_secrets(error):
        known = "look for line breaks in the credentials (AWS_...)"
        if not _is_about_a_header(error):
            known = (
                "the address of a proxy or of the server cannot be read: check HTTP_PROXY, HTTPS_PROXY and the endpoint"
            )
        return InputError(f"{where}: the request cannot be sent; {known}")
    if isinstance(error, STRANGE):
        return _strange(where, server, told(error))
    if not isinstance(error, ClientError):
        return InputError(
            f"{where}: the request cannot be made ({brief(error)}); check the URL and the storage settings"
        )
    code, status = code_of(error), status_of(error)
    if code in _SKEWED:
        return StorageError(
            f"{where}: the server refuses requests from this machine's clock, which is {_skew(error.response, now())}; "
            "synchronise it (NTP) and run the command again"
        )
    if code in _EXPIRED:
        return StorageError(
            f"{where}: the credentials have expired ({code}), and new ones were not to be had; log in again, or mend the provider "
            "of credentials, and run the command again"
        )
    if status == 412 or code == "PreconditionFailed":
        return ChangedError(f"{where} was changed since it was first looked at; read it again")
    if status == 416 or code == "InvalidRange":
        return ChangedError(f"{where} is shorter than it should be")
    if code == "NoSuchBucket":
        return MissingBucketError(f"{where}: the bucket does not exist; check its name and the endpoint, or make it")
    if status == 404 or code == "NoSuchKey":
        return MissingError(f"{where}: does not exist; check bucket, key and endpoint")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return StorageError(
            f"{where}: the server at {server} does not accept these credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY or the profile, and the endpoint"
        )
    if status in (401, 403):
        return StorageError(
            f"{where}: access is refused ({told(error)}); check bucket and key, and what these credentials may do "
            "(without the right to list a bucket, a missing object looks the same)"
        )
    if status in range(300, 400):
        to = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("location", "nowhere")
        return _strange(where, server, f"{told(error)} to {without_secrets(re.split('[?#]', to)[0])}")
    return StorageError(f"{where}: the server refuses the request ({told(error)})")


def _strange(where: str, server: str, what: str) -> StorageError:
    return StorageError(f"{where}: the server at {server} does not answer as S3 does ({what}); check the endpoint")


def _skew(response: dict[str, Any], now: datetime) -> str:
    date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        seconds = (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return "too far from its own (it does not say how far)"
    return f"{abs(seconds):.0f} seconds {'ahead of' if seconds > 0 else 'behind'} its own"
