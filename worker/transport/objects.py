"""What the object store talks about: objects and their URIs."""

import re
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from worker.errors import StoreRefused

_SCHEME = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
"""What the SDK takes for a bucket's name and sends as it is; an access point's ARN goes to another host."""


class StoredObject(msgspec.Struct, frozen=True):
    """One stored object, as it was when it was looked at."""

    uri: str
    etag: str
    """Without the quotes, as S3 event messages have it."""
    size: int
    """Bytes."""
    metadata: dict[str, str] = {}
    """What was said of it when it was stored, names in lower case; known after a `get` or a `head`."""


class Readable(Protocol):
    """What can be looked at and read; see `Store`."""

    async def head(self, uri: str) -> StoredObject | None:
        """Look at an object without reading it; None when there is none."""

    def stream(
        self, stored: StoredObject, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Bytes `start` to `stop` of exactly that version, in chunks."""


def parse_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be empty. Raises StoreRefused.

    All after the bucket is the key as it is: `?`, `#` and `%` mean nothing in it.
    """
    bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
    if not uri.startswith(_SCHEME) or not _BUCKET.fullmatch(bucket):
        raise StoreRefused(f"{uri!r} is not of the form s3://bucket/key")
    return bucket, key


def make_uri(bucket: str, key: str) -> str:
    """The opposite of `parse_uri`."""
    return f"{_SCHEME}{bucket}/{key}"
