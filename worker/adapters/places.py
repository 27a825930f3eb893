"""Where things that are to be registered lie: on this machine, or in S3."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from worker.errors import (
    InvalidRegistration,
    ObjectNotFound,
    RegistryUnavailable,
    StoreRefused,
    StoreUnavailable,
)

_SCHEME = "file://"


def path_of_url(url: str, field: str) -> str:
    """The path that a `file://` URL means; what is no such URL is a path itself.

    Raises InvalidRegistration, which names `field`, for one of another machine, or that is not UTF-8.
    """
    if not url.startswith(_SCHEME):
        return url
    try:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="strict")
    except ValueError as error:
        raise InvalidRegistration(f"{field}: {url!a} is not a file:// URL: {error}") from error
    if parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
        raise InvalidRegistration(f"{field}: {url!a} is not a file:///path of this machine")
    return path


@contextmanager
def reading(said: str, refused: type[InvalidRegistration] = InvalidRegistration) -> Iterator[None]:
    """What the store raises in the block becomes what the management API answers.

    `said` tells what was asked for, as in `src is 's3://bucket/prefix/'`. Raises `refused` for what is not
    there or not to be had, and RegistryUnavailable for what may be had later.
    """
    try:
        yield
    except ObjectNotFound as error:
        raise refused(f"{said}; there is no {error.uri}") from error
    except StoreRefused as error:
        raise refused(f"{said}, which cannot be read: {error}") from error
    except StoreUnavailable as error:
        raise RegistryUnavailable(f"{said}, which cannot be read now: {error}") from error
