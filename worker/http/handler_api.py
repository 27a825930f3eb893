"""Calls of a custom handler, as DJL Serving hands them over: one request each.

Headers become properties of the Input, the parameters of the query and of a form its content, any other body
its `data`. Of the Output, properties become headers, and code and message the status.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from urllib.parse import parse_qsl

from aiohttp import BodyPartReader, web
from multidict import CIMultiDict

from worker.custom.answers import Answer, failure
from worker.custom.handler import CustomHandler
from worker.custom.messages import Content
from worker.errors import HandlerBusy, HandlerDied
from worker.http.answers import Refused
from worker.http.bodies import BODY_SECONDS, BROKEN, read_body, too_large, too_slow
from worker.http.requests import while_there
from worker.http.streaming import send_pieces
from worker.wire.native import ADAPTER_HEADER
from worker.workflows.definition import IN, OUT, Workflow

logger = logging.getLogger(__name__)

_ATTRIBUTES_HEADER = "x-amzn-sagemaker-custom-attributes"
_MOST_PARAMETERS = 1000
_OURS_ALONE = frozenset({"handler", "batch_size", "model_dir", "device_id"})
"""Properties that say which function is called, with how many requests, and where."""
_PRIVATE = frozenset({"authorization"})
"""Headers that are for the worker: its token is among them."""
_FRAMING = frozenset({
    "connection", "content-encoding", "content-length", "keep-alive", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
"""Headers that are the server's to say."""
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_FORM = "application/x-www-form-urlencoded"


class HandlerApi:
    """Asks `handler`, in whatever form a request is."""

    def __init__(self, handler: CustomHandler, max_body_bytes: int) -> None:
        self._handler = handler
        self._max_body_bytes = max_body_bytes

    async def answer(self, request: web.Request, workflow: Workflow | None = None) -> web.StreamResponse:
        """What the handler says, to the last of the workflow's calls if there is one.

        Raises Refused for a request that it is not asked about.
        """
        found = await self._ask(request, workflow)
        if found.pieces is None:
            return _response(found, found.body)
        return await _streamed(request, found)

    async def _ask(self, request: web.Request, workflow: Workflow | None) -> Answer:
        properties = properties_of(request.headers)
        content = [(name, value.encode()) for name, value in _parameters(request.rel_url.raw_query_string)]
        content += await _sent(request, self._max_body_bytes)
        named = ADAPTER_HEADER in request.headers or any(name == "adapter" for name, _ in content)
        if workflow is not None and named:
            raise Refused(
                400, f"An adapter is named, and the workflow {workflow.name} has adapters of its own"
            )
        if workflow is None:
            asking = self._handler.call(self._handler.function, properties, tuple(content))
        else:
            asking = self._chained(workflow, properties, tuple(content))
        try:
            return await while_there(request, asking)
        except HandlerBusy as error:
            raise Refused(503, str(error)) from error
        except HandlerDied as error:
            return Answer(failure(str(error)))

    async def _chained(self, workflow: Workflow, properties: dict[str, str], content: Content) -> Answer:
        """What one call is answered is the content of the next; an adapter's name is added as `adapter`."""
        said: dict[str, Content] = {IN: content}
        for call in workflow.calls:
            asked = said[call.argument]
            if call.adapter is not None:
                asked = (*asked, ("adapter", workflow.adapter_name(call.adapter).encode()))
            found = await self._handler.call(self._handler.function, properties, asked)
            if found.is_failure or call.value == OUT:
                break
            body = await found.read()
            said[call.value] = found.content if found.pieces is None else (("data", body),)
        return found


def properties_of(headers: Mapping[str, str]) -> dict[str, str]:
    """What a handler gets of a request's headers. Raises Refused for one that it may not be sent."""
    properties = {}
    for name, value in headers.items():
        if name.lower() == _ATTRIBUTES_HEADER:
            pairs = (pair.partition("=") for pair in value.split(";"))
            properties.update({key.strip(): said.strip() for key, equals, said in pairs if equals})
        elif name.lower() not in _PRIVATE:
            properties[name] = value
    ours = next((name for name in properties if name.lower() in _OURS_ALONE), None)
    if ours is not None:
        raise Refused(400, f"The {ours} can't be overridden in a request")
    return properties


def _parameters(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARAMETERS)
    except ValueError as error:
        raise Refused(400, f"The query or form is not UTF-8, or has over {_MOST_PARAMETERS} names") from error


async def _sent(request: web.Request, max_bytes: int) -> list[tuple[str, bytes]]:
    """What the body holds, by name."""
    if request.content_type == "multipart/form-data":
        return await _form(request, max_bytes)
    body = await read_body(request, max_bytes, BODY_SECONDS)
    if request.content_type == _FORM:
        return [(name, value.encode()) for name, value in _parameters(body.decode("utf-8", "replace"))]
    return [("data", body)]


async def _form(request: web.Request, max_bytes: int) -> list[tuple[str, bytes]]:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return [field async for field in _fields(request, max_bytes)]
    except TimeoutError as error:
        raise too_slow(BODY_SECONDS) from error
    except (*BROKEN, ValueError) as error:
        raise Refused(400, "The body cannot be read as what its content type says") from error


async def _fields(request: web.Request, max_bytes: int) -> AsyncIterator[tuple[str, bytes]]:
    number = 0
    async for part in await request.multipart():
        number += 1
        if number > _MOST_PARAMETERS:
            raise Refused(400, f"The form has over {_MOST_PARAMETERS} parts")
        if not isinstance(part, BodyPartReader):
            raise Refused(400, "The form has another one in it")
        data, piece = bytearray(), b"."
        while piece:
            data += (piece := await part.read_chunk())
            if request.content.total_bytes > max_bytes:  # the heads of parts count as well
                raise too_large(max_bytes)
        yield part.name or "data", bytes(data)


def _headers(found: Answer) -> CIMultiDict[str]:
    """Its properties, but those that are no header or the server's to say; of one said twice the last."""
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in found.properties.items():
        if not _NAME.fullmatch(name) or _CONTROL.search(value):
            logger.warning("the handler's property is no header", extra={"property": name[:100]})
        elif name.lower() not in _FRAMING:
            kept[name] = value
    return kept


def _reason(found: Answer) -> str:
    return _CONTROL.sub(" ", found.message)[:200]


def _response(found: Answer, body: bytes) -> web.Response:
    headers = _headers(found)
    if found.status in {204, 304}:
        return web.Response(status=found.status, reason=_reason(found), headers=headers)
    return web.Response(body=body, status=found.status, reason=_reason(found), headers=headers)


async def _streamed(request: web.Request, found: Answer) -> web.StreamResponse:
    assert found.pieces is not None
    response = web.StreamResponse(status=found.status, reason=_reason(found), headers=_headers(found))
    return await send_pieces(request, response, found.pieces)
