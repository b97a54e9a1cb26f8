"""A URL -> the storage behind it."""

from __future__ import annotations

import os

from imaml_dist.errors import InputError
from imaml_dist.storage.folder import Folder
from imaml_dist.storage.local import checked_text, without_secrets
from imaml_dist.storage.options import StorageOptions
from imaml_dist.storage.protocol import Storage

S3 = "s3://"


def open_storage(url: str | os.PathLike[str], options: StorageOptions | None = None) -> Storage:
    """The storage behind a path, a `file://` URL or `s3://bucket/prefix`. Nothing is asked of it yet.

    Raises:
        InputError: another scheme, an `s3://` URL without a bucket, or no text.
    """
    text = checked_text(url)
    if text.startswith(S3):
        from imaml_dist.storage.s3 import Bucket

        return Bucket(text, options or StorageOptions())
    scheme, mark, _ = text.partition("://")
    if mark and scheme != "file":
        raise InputError(
            f"{without_secrets(text)}: scheme {scheme!r} is not supported; give a path, a file:// URL, or s3://bucket/prefix"
        )
    return Folder(text)
