"""The body of a request, of bounded size and in bounded time."""

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from worker.http.answers import Refused

BODY_SECONDS = 30.0
"""How long a body may take to come."""
BROKEN = (web.RequestPayloadError, web.PayloadAccessError, web.HTTPException, HttpProcessingError, OSError)


async def read_body(request: web.Request, max_bytes: int, seconds: float) -> bytes:
    """All of it, unpacked if it came so. Raises Refused: 408 for one too slow, 413 too large, 400 broken."""
    if not request.can_read_body:
        return b""
    if request.content_length is not None and request.content_length > max_bytes:
        raise too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large(max_bytes)
    except TimeoutError as error:
        raise too_slow(seconds) from error
    except BROKEN as error:
        raise Refused(400, "The body cannot be read") from error
    return bytes(body)


def too_large(max_bytes: int) -> Refused:
    return Refused(413, f"The body is too large: it may have {max_bytes} bytes")


def too_slow(seconds: float) -> Refused:
    return Refused(408, f"The body did not come within {seconds:g} s")
