"""Answers that go out piece by piece."""

import asyncio
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from worker.errors import LoramillError

logger = logging.getLogger(__name__)

_WRITE_SECONDS = 30.0
"""How long a client may take to read a piece of a stream."""


async def send_pieces(
    request: web.Request, response: web.StreamResponse, pieces: AsyncIterator[bytes]
) -> web.StreamResponse:
    """Pass pieces on as they come. A stream that breaks off ends the connection, so that it is noticed.

    So does a client that reads nothing: it would keep its place.
    """
    await response.prepare(request)
    try:
        async for piece in pieces:
            async with asyncio.timeout(_WRITE_SECONDS):
                await response.write(piece)
        async with asyncio.timeout(_WRITE_SECONDS):
            await response.write_eof()
    except ConnectionError:
        pass  # the client has gone
    except (LoramillError, TimeoutError) as error:
        reason = str(error) or f"its client read nothing for {_WRITE_SECONDS:g} s"
        logger.warning("a stream broke off: %s", reason)
        if request.transport is not None:
            request.transport.abort()
    return response
