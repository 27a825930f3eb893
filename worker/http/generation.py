"""The base model and its adapters, called over HTTP: a body -> rows -> the engine -> an answer."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from worker.errors import InvalidMessage, TimedOut
from worker.http.answers import Refused
from worker.http.formatting import BodyFormatting, Formatted
from worker.jobs import Delta, Failure, OnDelta, Row, RowResult
from worker.wire.calls import Asked, read_call, write_answer
from worker.wire.checks import failure_of, parse_object
from worker.wire.openai_calls import (
    read_openai_call,
    read_streaming,
    refuse_to_stream,
    shape_of,
    write_openai_answer,
)
from worker.wire.results import failure_in
from worker.wire.streams import Events, Streamed

Answering = Callable[[str, Sequence[Row], float, OnDelta | None], Awaitable[list[RowResult]]]
"""`EngineRows.answer`."""

STATUSES = {
    "model_not_found": 404,
    "adapter_not_found": 424,
    "adapter_invalid": 424,
    "handler_failed": 424,
    "internal": 424,
    "oom": 507,
    "timeout": 504,
}
"""By the code of a row's error, for calls of a single row; what is not here is the caller's, 400."""


class Call(NamedTuple):
    """One request that is for the model."""

    id: str
    """Unique."""
    body: bytes
    content_type: str | None
    """Without its parameters, in lower case; None where there is none."""
    adapter: str | None
    """That query or header name for all of it; None if they name none, "" is the base model."""
    workflow: str | None = None
    """What the rows are put through, where the model was called by a workflow's name."""
    shape: str | None = None
    """`chat` or `completion`, where the route says which of OpenAI's bodies it takes."""
    is_plain: bool = False
    """Whether no model was named: then a body may name one."""


class Reply(NamedTuple):
    """What a call is answered with."""

    content_type: str
    pieces: AsyncGenerator[bytes] | None
    """For one that is streamed; else it is in the body."""
    body: bytes
    outcomes: list[str]
    """Of each row `completed` or its error's code; those of a stream are there when it has ended."""


class CallLimits(NamedTuple):
    """What calls may ask for."""

    max_rows: int
    """Of all calls together."""
    timeout_seconds: float


class Generation:
    """Answers calls with what `answering` makes of their rows.

    The rows of all calls together are bounded: what comes beyond that is refused at once, to be tried again.
    """

    def __init__(
        self,
        answering: Answering,
        limits: CallLimits,
        base_models: Sequence[str],
        is_workflow: Callable[[str], bool] = lambda _: False,
        formatting: BodyFormatting | None = None,
    ) -> None:
        """`base_models` are the names by which a request may call the base model, the first in answers.

        `is_workflow` tells what else OpenAI's `model` may name, beside adapters.
        """
        self._is_workflow = is_workflow
        self._formatting = formatting
        self._answering = answering
        self._limits = limits
        self._base_models = base_models
        self.num_rows = 0
        """At work."""

    async def answer(self, call: Call) -> Reply:
        """Raises Refused and EngineFailed; so may the pieces of a stream, but for the first."""
        said: Formatted | None = None
        try:
            # Reading a large body takes a while, and others are to be answered.
            said = await self._formatted(call, await asyncio.to_thread(_body, call))
            asked = await asyncio.to_thread(self._read, call, said)
        except InvalidMessage as error:
            if said is not None and said.trouble is not None:
                raise _refusal(failure_of(said.trouble), is_openai=False) from error
            raise Refused(400, _sentence(error)) from error
        if asked.stream is not None:
            outcomes: list[str] = []
            pieces = self._stream(call, asked, asked.stream, outcomes)
            return Reply(asked.stream.content_type, _after(await anext(pieces), pieces), b"", outcomes)
        results = await self._run(call, asked)
        failures = [failure_in(result) for result in results]
        if asked.is_single and failures[0] is not None:
            raise _refusal(failures[0], is_openai=asked.is_openai)
        body = await asyncio.to_thread(self._write, call, asked, results)
        outcomes = [failure.code if failure else "completed" for failure in failures]
        return Reply("application/json", None, body, outcomes)

    async def _formatted(self, call: Call, body: dict[str, Any]) -> Formatted:
        if self._formatting is None or call.shape is not None:
            return Formatted(body)
        seconds = self._limits.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._formatting.format(body, adapter=call.adapter, workflow=call.workflow)
        except TimeoutError as error:
            late = TimedOut(f"The body was not formatted within {seconds:g} s")
            raise _refusal(failure_of(late), is_openai=False) from error

    async def _stream(
        self, call: Call, asked: Asked, stream: Streamed, outcomes: list[str]
    ) -> AsyncGenerator[bytes]:
        """A row that fails before anything was said of it is Refused."""
        said: asyncio.Queue[Delta | None] = asyncio.Queue()
        work = asyncio.create_task(self._run(call, asked, said.put_nowait), name=f"call-{call.id}")
        work.add_done_callback(lambda _: said.put_nowait(None))
        has_begun = False
        try:
            while (delta := await said.get()) is not None:
                if piece := stream.token(delta):
                    has_begun = True
                    yield piece
            (result,) = await work
            failure = failure_in(result)
            if failure is not None and not has_begun:
                raise _refusal(failure, is_openai=asked.is_openai)
            outcomes.append(failure.code if failure else "completed")
            yield stream.end(result)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def _read(self, call: Call, said: Formatted) -> Asked:
        body, names = said.body, self._base_models
        shape = call.shape or shape_of(body)
        if shape is None:
            return read_call(
                body,
                max_rows=self._limits.max_rows,
                adapter=call.adapter,
                base_models=names,
                workflow=call.workflow,
                keeps_raw=said.by_row,
            )
        workflow, model = call.workflow, body.get("model")
        if isinstance(model, str) and (workflow is None or call.is_plain):
            workflow = model if self._is_workflow(model) else None
        rest, streams, with_usage = read_streaming(body)
        row = read_openai_call(
            rest, shape, call_id=call.id, adapter=call.adapter, base_models=names, workflow=workflow
        )
        if not streams:
            return Asked((row,), is_single=True, is_openai=True)
        refuse_to_stream(row)
        stream = Events(
            row, number=call.id, created=int(time.time()), base_model=names[0], with_usage=with_usage
        )
        return Asked((row,), is_single=True, is_openai=True, stream=stream)

    def _write(self, call: Call, asked: Asked, results: Sequence[RowResult]) -> bytes:
        if not asked.is_openai:
            return write_answer(asked, results)
        created, base_model = int(time.time()), self._base_models[0]
        return write_openai_answer(results[0], call_id=call.id, created=created, base_model=base_model)

    async def _run(self, call: Call, asked: Asked, on_delta: OnDelta | None = None) -> list[RowResult]:
        rows = len(asked.rows)
        if self.num_rows + rows > self._limits.max_rows:
            at_work = f"{self.num_rows} rows of calls are at work, and there may be {self._limits.max_rows}"
            raise Refused(503, f"The worker is busy: {at_work}", headers={"Retry-After": "1"})
        self.num_rows += rows
        try:
            return await self._answering(call.id, asked.rows, self._limits.timeout_seconds, on_delta)
        finally:
            self.num_rows -= rows


async def _after(first: bytes, others: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """All of them; when nobody wants any more, `others` are told at once."""
    async with aclosing(others):
        yield first
        async for piece in others:
            yield piece


def _body(call: Call) -> dict[str, Any]:
    """The fields of a body. Raises Refused for a type that is not served, and InvalidMessage."""
    if call.content_type in {None, "application/json"}:
        return parse_object(call.body)
    if call.content_type == "text/plain":
        try:
            return {"inputs": call.body.decode()}
        except UnicodeDecodeError as error:
            raise InvalidMessage("the body is not UTF-8") from error
    raise Refused(415, "The content type must be application/json, or text/plain for one prompt")


def _refusal(failure: Failure, *, is_openai: bool) -> Refused:
    status = STATUSES.get(failure.code, 400)
    if is_openai and failure.code == "adapter_not_found":
        status = 404  # there an adapter is a model
    refused = Refused(status, failure.message)
    refused.outcome = failure.code
    return refused


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
