"""A file to S3 in parts, and on one condition: that nothing is there yet.

The SDK's own transfers cannot do this: they refuse the condition as soon as there is more than one part.
"""

import asyncio
import base64
import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

LEAST_BYTES = 64 << 20
"""Smaller files go by a single PUT, which costs one request."""
PART_BYTES = 16 << 20
"""S3 wants at least 5 MiB, but for the last."""
MAX_PARTS = 10_000
_AT_ONCE = 4


async def upload_if_absent(
    client: Any,
    bucket: str,
    key: str,
    file: BinaryIO,
    *,
    size: int,
    content_type: str,
    metadata: Mapping[str, str],
) -> str:
    """Store `file`, which lies on disk and has `size` bytes, and return the ETag. Raises what the SDK raises.

    Of the conditions' errors, PreconditionFailed says that there is an object, and
    ConditionalRequestConflict that another upload was about to end: all parts are to be sent again. In
    memory are a few parts of PART_BYTES. What was sent of an upload that failed is given up.
    """
    where = {"Bucket": bucket, "Key": key}
    begun = await client.create_multipart_upload(
        **where, ContentType=content_type, Metadata=dict(metadata), ChecksumAlgorithm="SHA256"
    )
    upload = where | {"UploadId": begun["UploadId"]}
    try:
        parts = await _send_parts(client, upload, file, size)
        ended = await client.complete_multipart_upload(
            **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
        )
    except BaseException:
        await _give_up(client, upload)
        raise
    return str(ended["ETag"])


async def _send_parts(
    client: Any, upload: Mapping[str, str], file: BinaryIO, size: int
) -> list[dict[str, Any]]:
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    gate = asyncio.Semaphore(_AT_ONCE)

    async def send(number: int, start: int) -> dict[str, Any]:
        async with gate:
            body, digest = await asyncio.to_thread(_read, file, start, min(part_bytes, size - start))
            checksum = base64.b64encode(digest).decode()
            sent = await client.upload_part(**upload, PartNumber=number, Body=body, ChecksumSHA256=checksum)
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum}

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(send(number, start))
                for number, start in enumerate(range(0, size, part_bytes), 1)
            ]
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from error
    return [task.result() for task in tasks]


def _read(file: BinaryIO, start: int, size: int) -> tuple[bytes, bytes]:
    """A part and its SHA-256. Several threads read at once, so nobody may seek."""
    body = os.pread(file.fileno(), size, start)
    if len(body) != size:
        raise OSError(f"{file.name} became shorter while it was sent")
    return body, hashlib.sha256(body).digest()


async def _give_up(client: Any, upload: Mapping[str, str]) -> None:
    """Parts are paid for until somebody says this; a bucket's lifecycle rule may have to."""
    try:
        await client.abort_multipart_upload(**upload)
    except Exception as error:  # noqa: BLE001 (what broke the upload is what matters)
        logger.info("the parts of an upload could not be removed", extra={"reason": str(error)} | {**upload})
