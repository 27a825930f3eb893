"""The worker's HTTP side: /metrics, /live and /ready."""

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import LoramillError

_OPEN = frozenset({"/live", "/ready"})
"""Paths that a probe without credentials may ask for."""


@asynccontextmanager
async def serving(
    host: str,
    port: int,
    registry: CollectorRegistry,
    not_ready: Callable[[], str | None],
    *,
    token: str | None = None,
) -> AsyncIterator[int]:
    """Serve until the end of the block; yields the port, which the kernel chose when `port` is 0.

    /live answers 200 while the event loop runs; /ready answers 503 with the reason that `not_ready` gives,
    200 once it gives none. With a `token`, everything else asks for it as a bearer token. Raises
    LoramillError when the address cannot be had.
    """

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def ready(_: web.Request) -> web.Response:
        reason = not_ready()
        return (
            web.Response(text="ready\n") if reason is None else web.Response(text=f"{reason}\n", status=503)
        )

    app = web.Application(middlewares=[] if token is None else [_asking_for(token)])
    app.add_routes([web.get("/metrics", metrics), web.get("/live", live), web.get("/ready", ready)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as exc:
            raise LoramillError(f"http_port: cannot listen on {host}:{port}: {exc.strerror}") from exc
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _asking_for(token: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path not in _OPEN and not hmac.compare_digest(given, expected):
            return web.Response(
                text="a bearer token is required\n", status=401, headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return check
