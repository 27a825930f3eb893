"""What the object store talks about: objects, their URIs, and the ways in which it says no."""

import msgspec

from worker.errors import LoramillError

_SCHEME = "s3://"


class StoreRefused(LoramillError):
    """S3 said no and will say so again: access denied, no such bucket, no credentials, a bad URI or key."""


class ObjectTooLarge(StoreRefused):
    """The object at `uri` has `size` bytes, more than the caller would take."""

    def __init__(self, uri: str, size: int, max_bytes: int) -> None:
        self.uri = uri
        self.size = size
        self.max_bytes = max_bytes
        super().__init__(f"{uri} has {size} bytes; at most {max_bytes} are taken")


class StoredObject(msgspec.Struct, frozen=True):
    """One stored object, as it was when it was looked at."""

    uri: str
    etag: str
    """Without the quotes, as S3 event messages have it."""
    size: int
    """Bytes."""


def parse_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be empty. Raises StoreRefused.

    All after the bucket is the key as it is: `?`, `#` and `%` mean nothing in it.
    """
    bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
    if not uri.startswith(_SCHEME) or not bucket:
        raise StoreRefused(f"{uri!r} is not of the form s3://bucket/key")
    return bucket, key


def make_uri(bucket: str, key: str) -> str:
    """The opposite of `parse_uri`."""
    return f"{_SCHEME}{bucket}/{key}"
