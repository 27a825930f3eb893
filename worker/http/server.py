"""The worker's HTTP side: /metrics, /live and /ready, calls, and the adapter management API."""

import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import LoramillError
from worker.http.adapters_api import AdaptersApi, is_ours
from worker.http.answers import Refused, refusal
from worker.http.codes import refused_for
from worker.http.inference_api import InferenceApi
from worker.http.models_api import ModelsApi
from worker.http.paths import segments_of
from worker.http.requests import no_route
from worker.http.workflows_api import WorkflowsApi
from worker.metrics import HTTP_ROUTES, Metrics

logger = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""How long a connection may take to send the head of a request."""
LINGER_SECONDS = 1.0
"""How long what is left of a request is read after its answer."""
_GOODBYE_SECONDS = 5.0
"""How long answers under way may take when the server stops."""
_OPEN = frozenset({"/live", "/ready", "/ping"})
"""Paths that a probe without credentials may ask for."""


class Apis(NamedTuple):
    """What is answered beside probes and metrics, and where it is counted."""

    adapters: AdaptersApi | None = None
    calls: InferenceApi | None = None
    metrics: Metrics | None = None
    workflows: WorkflowsApi | None = None
    models: ModelsApi | None = None


@asynccontextmanager
async def serving(
    host: str,
    port: int,
    registry: CollectorRegistry,
    not_ready: Callable[[], str | None],
    *,
    token: str | None = None,
    apis: "Apis | None" = None,
) -> AsyncIterator[int]:
    """Serve until the end of the block; yields the port, which the kernel chose when `port` is 0.

    /live answers 200 while the event loop runs; /ready answers 503 with the reason that `not_ready` gives,
    200 once it gives none. `apis` answer what is their own, and are closed in the end. With a `token`,
    everything but those two and /ping asks for it as a bearer token. Raises LoramillError when the address
    cannot be had.
    """
    apis = apis or Apis()

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def ready(_: web.Request) -> web.Response:
        reason = not_ready()
        return (
            web.Response(text="ready\n") if reason is None else web.Response(text=f"{reason}\n", status=503)
        )

    middlewares = [] if apis.metrics is None else [_counting(apis.metrics)]
    middlewares += [_in_json, _refusing_browsers if token is None else _asking_for(token)]
    if apis.calls is not None:
        middlewares.append(_sending(apis.calls.is_ours, apis.calls.handle))
    if apis.models is not None:
        middlewares.append(_sending(apis.models.is_ours, apis.models.handle))
    if apis.adapters is not None:
        middlewares.append(_sending(is_ours, apis.adapters.handle))
    if apis.workflows is not None:
        middlewares.append(_sending(apis.workflows.is_ours, apis.workflows.handle))
    app = web.Application(middlewares=middlewares)
    app.add_routes([web.get("/metrics", exposition), web.get("/live", live), web.get("/ready", ready)])
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
        if apis.adapters is not None:
            apis.adapters.close()


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _counting(metrics: Metrics) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def count(request: web.Request, handler: _Handler) -> web.StreamResponse:
        first, *rest = segments_of(request)
        of_adapters = first == "adapters" or rest[1:2] == ["adapters"]
        route = "adapters" if of_adapters else first if first in HTTP_ROUTES else "other"
        started, status = time.monotonic(), 500
        try:
            answer = await handler(request)
            status = answer.status
            return answer
        finally:
            metrics.http_requests.labels(route, str(status)).inc()
            metrics.http_seconds.labels(route).observe(time.monotonic() - started)

    return count


@web.middleware
async def _in_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """What is wrong with a request, or with us, as an answer: also what aiohttp itself refuses."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return refusal(no_route())
    except web.HTTPException as error:
        allowed = error.headers.get("Allow")
        headers = None if allowed is None else {"Allow": allowed}
        return refusal(Refused(error.status, error.reason, headers=headers))
    except Refused as refused:
        return refusal(refused)
    except Exception as error:
        told = refused_for(error)
        if told is None:
            logger.exception("a request failed by a mistake of ours")
            told = Refused(500, "The request failed by a mistake of the worker's; its log has more")
        return refusal(told)


def _sending(
    ours: Callable[[web.Request], bool], answering: _Handler
) -> Callable[..., Awaitable[web.StreamResponse]]:
    """What puts an API in front of an application's own routes."""

    @web.middleware
    async def send(request: web.Request, handler: _Handler) -> web.StreamResponse:
        return await (answering(request) if ours(request) else handler(request))

    return send


@web.middleware
async def _refusing_browsers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """A page from anywhere, in a browser on this machine, may send what it likes to its loopback address."""
    if request.method not in {"GET", "HEAD"} and "Origin" in request.headers:
        raise Refused(403, "requests of web pages need a bearer token")
    return await handler(request)


def _asking_for(token: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path not in _OPEN and not hmac.compare_digest(given, expected):
            raise Refused(401, "a bearer token is required", headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return check
