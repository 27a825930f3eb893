"""Calling models over HTTP, as DJL Serving and SageMaker do.

POST /invocations               the worker's model, or the one that ?model_name= names
POST /predictions/{model}       the model of this name; /{version} may follow
POST /models/{model}/invoke     the same
GET  /ping                      200 when calls are answered, else 503 with the reason
POST /v1/chat/completions       as OpenAI's: `model` is the base model's name or an adapter's
POST /v1/completions            likewise
GET  /v1/models                 the base model and its adapters
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, NamedTuple

from aiohttp import web

from worker.http.answers import Refused, answer
from worker.http.bodies import BODY_SECONDS, read_body
from worker.http.generation import Call, Generation
from worker.http.handler_api import HandlerApi
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.http.requests import expect_method, expect_ready, no_route, while_there
from worker.http.streaming import send_pieces
from worker.metrics import Metrics
from worker.wire.native import ADAPTER_HEADER
from worker.wire.openai_calls import write_models
from worker.wire.openai_rows import URLS
from worker.workflows.registry import Workflows

PREFIXES = frozenset({"invocations", "predictions", "ping", "v1"})
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


class HttpLimits(NamedTuple):
    """What clients may do to the worker."""

    max_calls: int
    """That are read or at work."""
    max_body_bytes: int
    body_seconds: float = BODY_SECONDS


class InferenceApi:
    """Answers calls for the model, by `model`, its name. `not_ready` gives the reason while it cannot."""

    def __init__(
        self, model: str, limits: HttpLimits, not_ready: Callable[[], str | None], metrics: Metrics
    ) -> None:
        self._model = model
        self._limits = limits
        self._not_ready = not_ready
        self._metrics = metrics
        self.generation: Generation | None = None
        """What answers; set once the model is loaded."""
        self.handler: HandlerApi | None = None
        """What answers in its place, where there is one."""
        self.plain: str | None = None
        """The workflow that is meant where a call names no model; None is the model itself."""
        self.workflows: Workflows | None = None
        """Those of the worker's model; set once it is loaded."""
        self.adapters: Callable[[], Awaitable[list[str]]] = _none
        """Names of those that can be asked for."""
        self.num_calls = 0
        """That are read or at work."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_busy = time.monotonic()

    def is_ours(self, request: web.Request) -> bool:
        """Whether a request is for this API."""
        segments = segments_of(request)
        return segments[0] in PREFIXES or (segments[0] == "models" and segments[2:] == ["invoke"])

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request. Raises Refused and LoramillError."""
        try:
            return await self._run(request)
        except Refused as refused:
            if refused.outcome is not None:
                self._metrics.http_rows.labels(refused.outcome).inc()
            raise

    @property
    def idle_seconds(self) -> float:
        """For how long no call has been at work."""
        return 0.0 if self.num_calls else time.monotonic() - self._last_busy

    async def idle(self) -> None:
        """Wait until no call is at work."""
        await self._idle.wait()

    async def _run(self, request: web.Request) -> web.StreamResponse:
        segments, model, shape, version = segments_of(request), None, None, None
        match segments:
            case ["ping"] | ["v1", "models"]:
                expect_method(request, "GET", "HEAD")
                expect_ready(self._not_ready(), self)
                listed = len(segments) > 1
                return answer(await self._list() if listed else {"status": "Healthy"})
            case ["invocations"]:
                pass
            case ["predictions", segment] | ["models", segment, "invoke"]:
                model = decoded(segment)
            case ["predictions", segment, last]:
                model, version = decoded(segment), decoded(last)
            case ["v1", *_] if "/" + "/".join(segments) in URLS:
                shape = URLS["/" + "/".join(segments)]
            case _:
                raise no_route()
        expect_method(request, "POST")
        if self.handler is not None:
            return await self._handled(request, model, shape, version, self.handler)
        return await self._call(request, model, shape, version)

    async def _list(self) -> dict[str, Any]:
        return write_models(self._model, await self.adapters())

    async def _call(
        self, request: web.Request, name: str | None, shape: str | None, version: str | None
    ) -> web.StreamResponse:
        parameters = Parameters(request.rel_url.raw_query_string)
        if name is None and shape is None:
            name = parameters.take("model_name")
        if version is None and shape is None:
            version = parameters.take("model_version")
        adapter = _adapter(request, parameters.take("adapter"))
        parameters.end()
        content_type = _content_type(request)
        generation = expect_ready(self._not_ready(), self.generation)
        is_plain = name is None
        workflow = self.plain if name is None else None if name == self._model else name
        self._expect_model(workflow, version)
        with self._at_work():
            body = await read_body(request, self._limits.max_body_bytes, self._limits.body_seconds)
            call = Call(uuid.uuid4().hex, body, content_type, adapter, workflow, shape, is_plain)
            reply = await while_there(request, generation.answer(call))
            try:
                if reply.pieces is None:
                    return web.Response(body=reply.body, content_type=reply.content_type)
                response = web.StreamResponse(headers={"Content-Type": reply.content_type})
                async with aclosing(reply.pieces):
                    return await send_pieces(request, response, reply.pieces)
            finally:
                for outcome in reply.outcomes:
                    self._metrics.http_rows.labels(outcome).inc()

    async def _handled(
        self,
        request: web.Request,
        name: str | None,
        shape: str | None,
        version: str | None,
        handler: HandlerApi,
    ) -> web.StreamResponse:
        expect_ready(self._not_ready(), handler)
        if shape is not None:
            raise no_route()
        query = request.rel_url.query  # which the handler is given, too
        name, version = name or query.get("model_name"), version or query.get("model_version")
        workflow = self.plain if name is None else None if name == self._model else name
        self._expect_model(workflow, version)
        with self._at_work():
            if workflow is None or self.workflows is None:
                return await handler.answer(request)
            return await handler.answer(request, self.workflows.describe(workflow))

    def _expect_model(self, workflow: str | None, version: str | None) -> None:
        """Raises Refused, and UnknownWorkflow, for one that is not there. The model itself has no version."""
        if workflow is None:
            name, own = self._model, None
        elif self.workflows is None or not self.workflows.knows(workflow):
            raise Refused(404, f"The model {workflow} was not found")
        else:
            name, own = workflow, self.workflows.describe(workflow).version
        if version not in {None, own}:
            raise Refused(404, f"The model {name} was not found in version {version}")

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


async def _none() -> list[str]:
    return []


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
