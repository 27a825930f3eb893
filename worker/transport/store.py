"""The object store: what the worker asks of it, and S3."""

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from worker.errors import ObjectExists, ObjectNotFound, ObjectTooLarge, StoreRefused, StoreUnavailable
from worker.transport import multipart
from worker.transport.clients import Clients, jittered, translated
from worker.transport.objects import StoredObject, make_uri, parse_uri
from worker.transport.tree import download_tree

__all__ = ["S3Store", "Store", "StoredObject", "make_uri", "parse_uri"]

_CHUNK_BYTES = 1 << 20
_CONFLICT_ATTEMPTS = 6
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")
_STREAM_ATTEMPTS = 5
"""Tries in a row that bring nothing, after which a stream is given up."""


class Store(Protocol):
    """Objects at `s3://bucket/key`.

    Every method raises StoreUnavailable for trouble that time may mend, and StoreRefused when no retry can
    help. Subclass this: `download_tree` is the same for all stores.
    """

    async def put_if_absent(
        self,
        uri: str,
        body: bytes,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        """Store `body`, unless there is an object at `uri`: of many who try, one succeeds.

        Raises ObjectExists. The object found may be this very call's own: an answer lost in the network is
        followed by a retry, which finds what the first try stored. `metadata` (ASCII, names in lower
        case) is kept with the object.
        """

    async def put_file_if_absent(
        self,
        uri: str,
        file: BinaryIO,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        """As `put_if_absent`, of all of a file on disk, of any size. Raises OSError too.

        Nobody may change the file meanwhile; where it is being read does not matter and stays.
        """

    async def put(
        self, uri: str, body: bytes, content_type: str = "application/octet-stream"
    ) -> StoredObject:
        """Store `body` at `uri`, in place of whatever is there."""

    async def get(self, uri: str, *, max_bytes: int | None = None) -> tuple[bytes, StoredObject]:
        """Read a whole object. Raises ObjectNotFound, and ObjectTooLarge before reading the body."""

    async def head(self, uri: str) -> StoredObject | None:
        """Look at an object without reading it; None when there is none (or no such bucket)."""

    def list(self, uri: str) -> AsyncGenerator[StoredObject, None]:
        """Every object whose URI begins with `uri`, in the order of the keys."""

    def stream(
        self, stored: StoredObject, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Bytes `start` to `stop` of exactly that version, in chunks; close the generator if you leave early.

        A connection that breaks is followed by another, which goes on where it broke. Raises
        ObjectNotFound, and StoreUnavailable when the object was overwritten, when the bytes arrived
        damaged, or when nothing more arrives. What was stored by one PUT has a checksum, which the end of a
        whole, unbroken stream has proved.
        """

    async def download_tree(
        self,
        uri: str,
        directory: Path,
        *,
        on_bytes: Callable[[int], None] | None = None,
        without: Collection[str] = (),
    ) -> bool:
        """Make `directory` a copy of everything under the folder `uri`; see `tree.download_tree`."""
        return await download_tree(self, uri, directory, on_bytes=on_bytes, without=without)


class S3Store(Store):
    """S3. `sleep` waits between tries of a conditional PUT that met another one."""

    def __init__(
        self, clients: Clients, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._clients = clients
        self._sleep = sleep

    async def put_if_absent(
        self,
        uri: str,
        body: bytes,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        options = {"IfNoneMatch": "*", "Metadata": dict(metadata or {})}
        return await self._until_settled(uri, lambda: self._put(uri, body, content_type, options))

    async def put_file_if_absent(
        self,
        uri: str,
        file: BinaryIO,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        size = os.fstat(file.fileno()).st_size
        if size < multipart.LEAST_BYTES:
            body = await asyncio.to_thread(os.pread, file.fileno(), size, 0)
            return await self.put_if_absent(uri, body, content_type, metadata)

        async def upload() -> StoredObject:
            if await self.head(uri) is not None:  # else only the end of the upload would tell
                raise ObjectExists(uri)
            bucket, key = parse_uri(uri)
            # NoSuchUpload: it has ended already, an answer was lost, and the SDK asked again.
            ended = dict.fromkeys((*_CONFLICTS, "NoSuchUpload"), _Conflict(uri))
            with _errors(uri, ended):
                etag = await multipart.upload_if_absent(
                    self._clients.objects,
                    bucket,
                    key,
                    file,
                    size=size,
                    content_type=content_type,
                    metadata=metadata or {},
                )
            return _stored(uri, etag, size, metadata)

        return await self._until_settled(uri, upload)

    async def _until_settled(self, uri: str, put: Callable[[], Awaitable[StoredObject]]) -> StoredObject:
        """Try again while another conditional PUT of the same object is about to win or to fail."""
        for attempt in range(_CONFLICT_ATTEMPTS):
            if attempt:
                await self._sleep(jittered(0.1 * 2**attempt))
            try:
                return await put()
            except _Conflict:
                continue
        raise StoreUnavailable(f"{uri}: another conditional PUT was under way {_CONFLICT_ATTEMPTS} times")

    async def put(
        self, uri: str, body: bytes, content_type: str = "application/octet-stream"
    ) -> StoredObject:
        return await self._put(uri, body, content_type, {})

    async def get(self, uri: str, *, max_bytes: int | None = None) -> tuple[bytes, StoredObject]:
        with _errors(uri):
            answer = await self._get(uri, {})
            body = answer["Body"]
            async with body:  # `as` would give the raw response, which checks nothing
                stored = _stored(uri, answer["ETag"], answer["ContentLength"], answer["Metadata"])
                if max_bytes is not None and stored.size > max_bytes:
                    raise ObjectTooLarge(uri, stored.size, max_bytes)
                return await body.read(), stored

    async def head(self, uri: str) -> StoredObject | None:
        bucket, key = parse_uri(uri)
        try:
            with _errors(uri):
                answer = await self._clients.objects.head_object(Bucket=bucket, Key=key)
        except ObjectNotFound:
            return None
        return _stored(uri, answer["ETag"], answer["ContentLength"], answer["Metadata"])

    async def list(self, uri: str) -> AsyncGenerator[StoredObject, None]:
        bucket, prefix = parse_uri(uri)
        page: dict[str, str] = {}
        while True:
            with _errors(uri):
                answer = await self._clients.objects.list_objects_v2(Bucket=bucket, Prefix=prefix, **page)
            for entry in answer.get("Contents", []):
                yield _stored(make_uri(bucket, entry["Key"]), entry["ETag"], entry["Size"])
            if not answer.get("IsTruncated"):
                return
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    async def stream(
        self, stored: StoredObject, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        end = stored.size if stop is None else min(stop, stored.size)
        at, failures = start, 0
        while at < end or stored.size == 0:
            chunks = self._stream_once(stored, at, end)
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        at, failures = at + len(chunk), 0
                        yield chunk
            except _Overwritten:
                raise
            except StoreUnavailable:
                failures += 1
                if at >= end or failures == _STREAM_ATTEMPTS:
                    raise  # all of it came, and was damaged; or nothing comes any more
                await self._sleep(jittered(0.5 * 2**failures))
            else:
                return

    async def _stream_once(self, stored: StoredObject, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        options = {"IfMatch": f'"{stored.etag}"'}
        if (start, stop) != (0, stored.size):
            options["Range"] = f"bytes={start}-{stop - 1}"
        with _errors(stored.uri, {"PreconditionFailed": _Overwritten(stored.uri)}):
            answer = await self._get(stored.uri, options)
            body = answer["Body"]
            async with body:
                part = f"bytes {start}-{stop - 1}/{stored.size}"
                if "Range" in options and answer.get("ContentRange") != part:
                    raise StoreRefused(f"{stored.uri}: {answer.get('ContentRange')} came for {part}")
                while chunk := await body.read(_CHUNK_BYTES):
                    start += len(chunk)
                    yield chunk
        if start != stop:
            raise StoreUnavailable(f"{stored.uri}: the bytes end at {start}, and {stop} was asked for")

    async def _get(self, uri: str, options: Mapping[str, str]) -> Any:
        bucket, key = parse_uri(uri)
        return await self._clients.objects.get_object(
            Bucket=bucket, Key=key, ChecksumMode="ENABLED", **options
        )

    async def _put(
        self, uri: str, body: bytes, content_type: str, options: Mapping[str, Any]
    ) -> StoredObject:
        bucket, key = parse_uri(uri)
        # Made here and not by the SDK, which would send it as a trailer that not every server understands.
        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
        with _errors(uri, dict.fromkeys(_CONFLICTS, _Conflict(uri))):
            answer = await self._clients.objects.put_object(
                Bucket=bucket,
                Key=key,
                Body=body,
                ContentType=content_type,
                ChecksumSHA256=checksum,
                **options,
            )
        return _stored(uri, answer["ETag"], len(body), options.get("Metadata"))


class _Overwritten(StoreUnavailable):
    def __init__(self, uri: str) -> None:
        super().__init__(f"{uri} was overwritten while it was read")


class _Conflict(Exception):
    """409: another conditional PUT of the key was under way; who wins is not known yet."""


def _errors(uri: str, known: Mapping[str, Exception] | None = None) -> AbstractContextManager[None]:
    meanings: dict[str, Exception] = {
        "404": ObjectNotFound(uri),
        "NoSuchKey": ObjectNotFound(uri),
        "PreconditionFailed": ObjectExists(uri),
    }
    return translated(
        unavailable=lambda text: StoreUnavailable(f"{uri}: {text}"),
        refused=lambda text: StoreRefused(f"{uri}: {text}"),
        known=meanings | dict(known or {}),
    )


def _stored(uri: str, etag: str, size: int, metadata: Mapping[str, str] | None = None) -> StoredObject:
    return StoredObject(uri, etag.strip('"'), size, dict(metadata or {}))
