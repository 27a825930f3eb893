"""The mirror's own HTTP side, when it runs in a process of its own: /metrics, /live and /ready."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from adapters_sync.errors import SyncError


@asynccontextmanager
async def serving(
    host: str, port: int, registry: CollectorRegistry, ready: Callable[[], bool]
) -> AsyncIterator[int]:
    """Serve until the end of the block; yields the port, which the kernel chose when `port` is 0.

    /live answers 200 while the event loop runs, /ready 503 until `ready()`. Raises SyncError when the
    address cannot be had.
    """
    from aiohttp import web  # noqa: PLC0415 (what runs once has no HTTP side, and starts sooner so)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def live(request: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def is_ready(request: web.Request) -> web.Response:
        if ready():
            return web.Response(text="ready\n")
        return web.Response(text="the first full pass is not done\n", status=503)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/live", live), web.get("/ready", is_ready)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise SyncError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
