"""Calling models over HTTP, as DJL Serving and SageMaker do.

POST /invocations               the worker's model, or the one that ?model_name= names
POST /predictions/{model}       the model of this name
GET  /ping                      200 when calls are answered, else 503 with the reason
POST /v1/chat/completions       as OpenAI's: `model` is the base model's name or an adapter's
POST /v1/completions            likewise
GET  /v1/models                 the base model and its adapters
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aiohttp import web

from worker.errors import EngineFailed, RegistryUnavailable
from worker.http.answers import Refused, answer, refusal
from worker.http.bodies import read_body
from worker.http.calls import Call, Model, Reply
from worker.http.handler_api import HandlerApi
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.metrics import Metrics
from worker.wire.openai_calls import write_models
from worker.wire.openai_rows import URLS

logger = logging.getLogger(__name__)

PREFIXES = frozenset({"invocations", "predictions", "ping", "v1"})
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
_LOOK_SECONDS = 0.2
"""Between two looks whether the client is there yet."""
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


class HttpLimits(NamedTuple):
    """What clients may do to the worker."""

    max_calls: int
    """That are read or at work."""
    max_body_bytes: int
    body_seconds: float = 30.0
    """How long a body may take to come."""


class InferenceApi:
    """Answers calls for what is in `models`, which are filled in once they are loaded.

    `model` is the name of the one that `/invocations` is for. `not_ready` gives the reason while nothing
    can be served.
    """

    def __init__(
        self, model: str, limits: HttpLimits, not_ready: Callable[[], str | None], metrics: Metrics
    ) -> None:
        self._model = model
        self._limits = limits
        self._not_ready = not_ready
        self._metrics = metrics
        self.models: dict[str, Model] = {}
        self.handler: HandlerApi | None = None
        """What answers in the place of `models`, where there is one."""
        self.is_workflow: Callable[[str], bool] = lambda _: False
        """Whether a name that is no model's is one of a workflow of the worker's model."""
        self.adapters: Callable[[], Awaitable[list[str]]] = _none
        """Names of those that can be asked for."""
        self.num_calls = 0
        """That are read or at work."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_busy = time.monotonic()

    def is_ours(self, request: web.Request) -> bool:
        """Whether a request is for this API."""
        return segments_of(request)[0] in PREFIXES

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; what is wrong with it is in the answer."""
        try:
            return await self._run(request)
        except Refused as refused:
            if refused.outcome is not None:
                self._metrics.http_rows.labels(refused.outcome).inc()
            return refusal(refused)
        except RegistryUnavailable as error:
            return refusal(Refused(503, str(error)))
        except EngineFailed:
            return refusal(Refused(503, "The worker is not ready: the engine has stopped"))
        except Exception:
            logger.exception("a call failed by a mistake of ours")
            return refusal(Refused(500, "The call failed by a mistake of the worker's; its log has more"))

    @property
    def idle_seconds(self) -> float:
        """For how long no call has been at work."""
        return 0.0 if self.num_calls else time.monotonic() - self._last_busy

    async def idle(self) -> None:
        """Wait until no call is at work."""
        await self._idle.wait()

    async def _run(self, request: web.Request) -> web.StreamResponse:
        segments, model, shape = segments_of(request), None, None
        match segments:
            case ["ping"] | ["v1", "models"]:
                _expect_method(request, "GET", "HEAD")
                self._expect_ready()
                listed = len(segments) > 1
                return answer(await self._list() if listed else {"status": "Healthy"})
            case ["invocations"]:
                pass
            case ["predictions", segment]:
                model = decoded(segment)
            case ["v1", *_] if "/" + "/".join(segments) in URLS:
                shape = URLS["/" + "/".join(segments)]
            case _:
                raise Refused(404, "Requested resource is not found", kind="ResourceNotFoundException")
        _expect_method(request, "POST")
        if self.handler is not None:
            return await self._handled(request, model, shape, self.handler)
        reply = await self._call(request, model, shape)
        for outcome in reply.outcomes:
            self._metrics.http_rows.labels(outcome).inc()
        return web.Response(body=reply.body, status=reply.status, content_type=reply.content_type)

    async def _list(self) -> dict[str, Any]:
        return write_models(self._model, await self.adapters())

    async def _call(self, request: web.Request, name: str | None, shape: str | None) -> Reply:
        parameters = Parameters(request.rel_url.raw_query_string)
        if name is None and shape is None:
            name = parameters.take("model_name")
        adapter = _adapter(request, parameters.take("adapter"))
        parameters.end()
        content_type = _content_type(request)
        self._expect_ready()
        model, workflow = self.models.get(self._model if name is None else name), None
        if model is None and name is not None and self.is_workflow(name):
            model, workflow = self.models.get(self._model), name
        if model is None:
            raise Refused(404, f"The model {name} was not found")
        with self._at_work():
            body = await read_body(request, self._limits.max_body_bytes, self._limits.body_seconds)
            headers = {key.lower(): value for key, value in request.headers.items()}
            call = Call(uuid.uuid4().hex, body, content_type, adapter, headers, workflow, shape)
            return await _while_there(request, model, call)

    async def _handled(
        self, request: web.Request, name: str | None, shape: str | None, handler: HandlerApi
    ) -> web.StreamResponse:
        self._expect_ready()
        if shape is not None:
            raise Refused(404, "Requested resource is not found", kind="ResourceNotFoundException")
        if name not in {None, self._model}:
            raise Refused(404, f"The model {name} was not found")
        with self._at_work():
            return await handler.answer(request)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """One call more. Raises Refused when there are as many as there may be."""
        if self.num_calls >= self._limits.max_calls:
            raise Refused(
                503,
                f"The worker is busy: {self.num_calls} calls are at work, as many as there may be",
                headers={"Retry-After": "1"},
            )
        self.num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_calls -= 1
            self._last_busy = time.monotonic()
            if not self.num_calls:
                self._idle.set()

    def _expect_ready(self) -> None:
        reason = self._not_ready()
        if reason is not None:
            raise Refused(503, f"The worker is not ready: {reason}", headers={"Retry-After": "5"})


async def _none() -> list[str]:
    return []


async def _while_there(request: web.Request, model: Model, call: Call) -> Reply:
    """The model's answer; its rows are dropped when the client has gone."""
    work = asyncio.create_task(model.answer(call), name=f"call-{call.id}")
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=_LOOK_SECONDS)
            transport = request.transport
            if not work.done() and (transport is None or transport.is_closing()):
                raise Refused(499, "The client has gone")  # nobody reads this but the metrics
        return work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _expect_method(request: web.Request, *methods: str) -> None:
    if request.method not in methods:
        allowed = {"Allow": ", ".join(methods)}
        raise Refused(405, f"The method {request.method} is not allowed here", headers=allowed)


def _adapter(request: web.Request, said_in_query: str | None) -> str | None:
    """What query or header name for all of a call; the header wins. Raises Refused if that says two."""
    said = {*request.headers.getall(ADAPTER_HEADER, [])}
    if len(said) > 1:
        raise Refused(400, f"The header {ADAPTER_HEADER} is there twice, with different values")
    return next(iter(said), said_in_query)


def _content_type(request: web.Request) -> str | None:
    """Without parameters. Raises Refused for a charset other than UTF-8."""
    if "Content-Type" not in request.headers:
        return None
    try:
        content_type, charset = request.content_type, request.charset
    except ValueError as error:
        raise Refused(415, "The content type cannot be read") from error
    if charset is not None and charset.lower() not in _CHARSETS:
        raise Refused(415, "The charset must be UTF-8")
    return content_type.lower()
