"""What every request must be before it is looked into, and whether somebody waits for its answer yet."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from worker.http.answers import Refused
from worker.http.bodies import read_body

T = TypeVar("T")

_LOOK_SECONDS = 0.2
"""Between two looks whether the client is there yet."""
BODY_SECONDS = 10.0
MAX_BODY_BYTES = 64 << 10
"""Of a body that nobody wants."""


def expect_method(request: web.Request, *methods: str) -> None:
    """Raises Refused for any other method."""
    if request.method not in methods:
        allowed = {"Allow": ", ".join(methods)}
        raise Refused(405, f"The method {request.method} is not allowed here", headers=allowed)


def expect_ready(reason: str | None, part: T | None) -> T:
    """What is to answer. Raises Refused while there is none, or a `reason` why nothing can be served."""
    if reason is not None or part is None:
        said = f"The worker is not ready: {reason or 'loading the model'}"
        raise Refused(503, said, headers={"Retry-After": "5"})
    return part


async def expect_no_body(request: web.Request) -> None:
    """Raises Refused for a request that has one."""
    if await read_body(request, MAX_BODY_BYTES, BODY_SECONDS):
        raise Refused(400, "The request has a body; parameters go into the query")


def no_route() -> Refused:
    """What a path is told that leads nowhere."""
    return Refused(404, "Requested resource is not found", kind="ResourceNotFoundException")


async def while_there(request: web.Request, work: Coroutine[Any, Any, T]) -> T:
    """What comes of `work`; it is cancelled when the client has gone. Raises Refused then."""
    task = asyncio.create_task(work, name="call")
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_SECONDS)
            transport = request.transport
            if not task.done() and (transport is None or transport.is_closing()):
                raise Refused(499, "The client has gone")  # nobody reads this but the metrics
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
