"""The worker's HTTP side: /metrics, /live and /ready, and before them the adapter management API."""

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import LoramillError
from worker.http.adapters_api import AdaptersApi, is_ours
from worker.http.answers import Refused, refusal

MAX_BODY_BYTES = 64 << 10
IDLE_SECONDS = 30.0
"""How long a connection may take to send the head of a request."""
LINGER_SECONDS = 1.0
"""How long what is left of a request is read after its answer."""
_GOODBYE_SECONDS = 5.0
"""How long answers under way may take when the server stops."""
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
    api: AdaptersApi | None = None,
    routes: Iterable[web.RouteDef] = (),
) -> AsyncIterator[int]:
    """Serve until the end of the block; yields the port, which the kernel chose when `port` is 0.

    /live answers 200 while the event loop runs; /ready answers 503 with the reason that `not_ready` gives,
    200 once it gives none. `api` answers what is its own, and is closed in the end; `routes` are others'.
    With a `token`, everything but those two asks for it as a bearer token. Raises LoramillError when the
    address cannot be had.
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

    middlewares = [_refusing_browsers if token is None else _asking_for(token)]
    middlewares += [] if api is None else [api.middleware]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.get("/metrics", metrics), web.get("/live", live), web.get("/ready", ready)])
    app.add_routes(routes)
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=IDLE_SECONDS,
        lingering_time=LINGER_SECONDS,
        shutdown_timeout=_GOODBYE_SECONDS,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as exc:
            raise LoramillError(f"http_port: cannot listen on {host}:{port}: {exc.strerror}") from exc
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
        if api is not None:
            api.close()


@web.middleware
async def _refusing_browsers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A page from anywhere, in a browser on this machine, may send what it likes to its loopback address."""
    if request.method not in {"GET", "HEAD"} and "Origin" in request.headers:
        return refusal(Refused(403, "requests of web pages need a bearer token"))
    return await handler(request)


def _asking_for(token: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path not in _OPEN and not hmac.compare_digest(given, expected):
            refused = Refused(401, "a bearer token is required", headers={"WWW-Authenticate": "Bearer"})
            if is_ours(request):
                return refusal(refused)
            return web.Response(text=f"{refused.message}\n", status=refused.code, headers=refused.headers)
        return await handler(request)

    return check
