"""A bucket in memory that obeys the rules the mirror relies on: ETags follow content, a read is of the object
that was listed or none, time stamps are whole seconds. test_remote.py runs it beside a real server.
"""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from adapters_sync.errors import ObjectChanged
from adapters_sync.inventory import RemoteFile
from adapters_sync.uris import S3Prefix
from tests.sync.builders import AdapterUploads


class MemoryBucket(AdapterUploads):
    """What users put in, and, as `connect` gives it, what the mirror reads."""

    def __init__(self) -> None:
        self.source = S3Prefix("memory", "model/adapters/")
        self.objects: dict[str, tuple[bytes, float]] = {}

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["MemoryBucket"]:
        yield self

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = (data, float(int(time.time())))

    def get(self, path: str) -> bytes:
        return self.objects[path][0]

    def remove(self, path: str) -> None:
        self.objects.pop(path, None)

    def paths(self) -> list[str]:
        return sorted(self.objects)

    async def list(self) -> list[RemoteFile]:
        return [
            RemoteFile(path=path, size=len(data), etag=_etag(data), modified=modified)
            for path, (data, modified) in sorted(self.objects.items())
        ]

    async def read(self, path: str, etag: str) -> AsyncIterator[bytes]:
        data, _ = self.objects.get(path, (None, 0))
        if data is None or _etag(data) != etag:
            raise ObjectChanged(path)
        step = max(100, len(data) // 16)
        for start in range(0, len(data), step):
            yield data[start : start + step]


def _etag(data: bytes) -> str:
    return '"' + hashlib.sha256(data).hexdigest()[:32] + '"'
