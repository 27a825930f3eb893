"""S3, as far as the mirror needs it: the only code here that talks to AWS.

Plain client calls, never the resource layer or the transfer helpers: `download_file` and `download_fileobj`
read in ranges without IfMatch and can mix two objects without an error.
"""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpchecksum import handle_checksum_body
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.response import StreamingBody
from botocore.exceptions import BotoCoreError, ClientError

from adapters_sync.errors import ObjectChanged, RemoteUnavailable
from adapters_sync.inventory import RemoteFile
from adapters_sync.listing import Pages
from adapters_sync.shortcut import Shortcut
from adapters_sync.tasks import in_thread
from adapters_sync.uris import S3Prefix

MAX_CONNECTIONS = 32
MAX_ATTEMPTS = 4
PART_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_OBJECTS = "RemoteFiles"
_LIBRARY_ERRORS = (BotoCoreError, ClientError, aiohttp.ClientError, OSError)


@asynccontextmanager
async def connect(source: S3Prefix) -> AsyncIterator["Remote"]:
    """A Remote for one prefix, with one client that is closed at the end.

    Credentials, region and endpoint are the SDK's own (`AWS_*`).
    """
    connections: list[AIOHTTPSession] = []

    def connected(**kwargs: Any) -> AIOHTTPSession:
        connections.append(AIOHTTPSession(**kwargs))
        return connections[-1]

    config = AioConfig(
        http_session_cls=connected,
        max_pool_connections=MAX_CONNECTIONS,
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
        tcp_keepalive=True,
    )
    with _mapped_errors(f"connect to {source}"):
        context = aioboto3.Session().client("s3", config=config)
        client = await context.__aenter__()
    try:
        yield Remote(client, source, Shortcut(client, source.prefix, connections[-1].send, _LIBRARY_ERRORS))
    finally:
        await context.__aexit__(None, None, None)


class Remote:
    """The objects under one prefix. Paths are relative to it. Every call may raise RemoteUnavailable."""

    def __init__(self, client: Any, source: S3Prefix, shortcut: Shortcut) -> None:
        self._client = client
        self._shortcut = shortcut
        self.source = source
        self._pages = Pages(source.prefix)
        # The asterisk lets it go before a handler of the SDK's that parses a page whole, in search of errors.
        client.meta.events.register("before-parse.*.ListObjectsV2", self._take_page)

    async def list(self) -> list[RemoteFile]:
        """Every object under the prefix: all pages, or an error."""
        found: list[RemoteFile] = []
        self._pages.begin()
        with _mapped_errors(f"list {self.source}"):
            pages = self._client.get_paginator("list_objects_v2")
            async for page in pages.paginate(Bucket=self.source.bucket, Prefix=self.source.prefix):
                found += page.get(_OBJECTS, ())
                found += [_file(item, self.source.prefix) for item in page.get("Contents", ())]
        return found

    async def read(self, path: str, etag: str) -> AsyncGenerator[bytes, None]:
        """Stream one object, exactly the one that was listed: ObjectChanged when it is another by now.

        Close the iterator (contextlib.aclosing) when not reading to the end.
        """
        with _mapped_errors(f"read {self.source}{path}", changed=path):
            body = await self._open(path, etag)
            # Not `async with body as stream`: that hands out the bare response, whose reads verify nothing.
            try:
                while chunk := await body.read(_READ_BYTES):
                    yield chunk
            finally:
                body.close()

    async def _open(self, path: str, etag: str) -> Any:
        """The body of an object, which verifies its length and checksum where there is one."""
        at = self._at(path)
        if found := await self._shortcut.get(path, etag):
            response, context = found
            headers = response.headers
            parsed = {"headers": headers, "context": {}}
            parsed["body"] = StreamingBody(response.raw, headers.get("content-length"))
            operation = self._client.meta.service_model.operation_model("GetObject")
            await handle_checksum_body(response, parsed, context, operation)
            return parsed["body"]
        answer = await self._client.get_object(**at, IfMatch=etag, ChecksumMode="ENABLED")
        return answer["Body"]

    async def put(self, path: str, data: bytes) -> None:
        """Store a small object."""
        with _mapped_errors(f"write {self.source}{path}"):
            await self._client.put_object(**self._at(path), Body=data)

    async def put_file(self, path: str, source: Path, progress: Callable[[int], None]) -> str:
        """Store a file and return the sha256 of what was sent; in parts when it is longer than one.

        `progress` is told the number of bytes after each part. A failed upload leaves no parts behind.
        """
        with source.open("rb") as file:
            first = await in_thread(file.read, PART_BYTES)
            if len(first) == PART_BYTES:
                return await self._put_parts(path, first, file, progress)
            await self.put(path, first)
            progress(len(first))
            return hashlib.sha256(first).hexdigest()

    async def delete(self, path: str) -> None:
        with _mapped_errors(f"delete {self.source}{path}"):
            await self._client.delete_object(**self._at(path))

    async def _put_parts(
        self, path: str, chunk: bytes, file: BinaryIO, progress: Callable[[int], None]
    ) -> str:
        digest = hashlib.sha256()
        parts: list[dict[str, Any]] = []
        at = self._at(path)
        with _mapped_errors(f"write {self.source}{path}"):
            upload_id = (await self._client.create_multipart_upload(**at))["UploadId"]
        complete = False
        try:
            while chunk:
                await in_thread(digest.update, chunk)
                with _mapped_errors(f"write {self.source}{path}"):
                    number = len(parts) + 1
                    answer = await self._client.upload_part(
                        **at, UploadId=upload_id, PartNumber=number, Body=chunk
                    )
                checksums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
                parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
                progress(len(chunk))
                chunk = await in_thread(file.read, PART_BYTES)
            with _mapped_errors(f"write {self.source}{path}"):
                await self._client.complete_multipart_upload(
                    **at, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
            complete = True
        finally:
            if not complete:
                with _mapped_errors(f"abort the upload of {self.source}{path}"):
                    await self._client.abort_multipart_upload(**at, UploadId=upload_id)
        return digest.hexdigest()

    def _take_page(
        self, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
    ) -> None:
        """Leave to the SDK what a page says besides its objects."""
        if taken := self._pages.take(response_dict["body"]):
            customized_response_dict[_OBJECTS], response_dict["body"] = taken

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self.source.bucket, "Key": self.source.prefix + path}


def _file(item: dict[str, Any], prefix: str) -> RemoteFile:
    return RemoteFile(
        path=item["Key"].removeprefix(prefix),
        size=item["Size"],
        etag=item["ETag"],
        modified=item["LastModified"].timestamp(),
    )


@contextmanager
def _mapped_errors(action: str, changed: str | None = None) -> Iterator[None]:
    """Turn the libraries' errors into ours. A 404 or 412 for the object `changed` is ObjectChanged."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code", "unknown")
        if changed is not None and status in {404, 412} and code != "NoSuchBucket":
            raise ObjectChanged(changed) from error
        message = error.response.get("Error", {}).get("Message", "")
        raise RemoteUnavailable(f"cannot {action}: {code}: {message}") from error
    except _LIBRARY_ERRORS as error:
        raise RemoteUnavailable(f"cannot {action}: {error or type(error).__name__}") from error
