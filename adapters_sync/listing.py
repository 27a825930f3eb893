"""The objects of a listing's pages, without reading again what a page said the last time.

The SDK takes some 40 microseconds to parse an object, which for a bucket of ten thousand adapters is most of
a pass that changes nothing. Here the part of a page that holds the objects is cut out, and parsed when it is
another one than at the last listing; the rest of the page is left to the SDK.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

import hashlib
from datetime import datetime
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

from adapters_sync.inventory import RemoteFile

_FIRST, _LAST = b"<Contents>", b"</Contents>"
_QUOTED = b"<EncodingType>url</EncodingType>"


class Pages:
    """What the pages of the latest listing held. Paths are given without `prefix`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._before: dict[bytes, list[RemoteFile]] = {}
        self._now: dict[bytes, list[RemoteFile]] = {}

    def begin(self) -> None:
        """A listing begins: pages that are not in it are forgotten after it."""
        self._before, self._now = self._now, {}

    def take(self, page: bytes) -> tuple[list[RemoteFile], bytes] | None:
        """The objects of a page, and the page without them.

        None for a page that is written in another way than S3 does: it is the SDK's to read, whole. So is one
        without objects.
        """
        start, end = page.find(_FIRST), page.rfind(_LAST) + len(_LAST)
        if not 0 <= start < end:
            return None
        part, is_quoted = page[start:end], _QUOTED in page
        digest = hashlib.sha256(part).digest() + bytes([is_quoted])
        objects = self._before.get(digest)
        if objects is None:
            objects = _parse(part, self._prefix, is_quoted=is_quoted)
        if objects is None:
            return None
        self._now[digest] = objects
        return objects, page[:start] + page[end:]


def _parse(part: bytes, prefix: str, *, is_quoted: bool) -> list[RemoteFile] | None:
    """None when there is anything in it but objects that are told in full."""
    found = []
    try:
        for item in ET.fromstring(b"<Page>" + part + b"</Page>"):  # noqa: S314 (as the SDK would)
            told = {child.tag: child.text or "" for child in item}
            if item.tag != "Contents":
                return None
            key = unquote_plus(told["Key"]) if is_quoted else told["Key"]
            modified = datetime.fromisoformat(told["LastModified"]).timestamp()
            found.append(
                RemoteFile(
                    path=key.removeprefix(prefix),
                    size=int(told["Size"]),
                    etag=told["ETag"],
                    modified=modified,
                )
            )
    except (ET.ParseError, KeyError, ValueError):
        return None
    return found
