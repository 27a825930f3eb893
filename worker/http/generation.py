"""The base model and its adapters, called over HTTP: a body -> rows -> the engine -> an answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from worker.errors import InvalidMessage
from worker.http.answers import Refused
from worker.jobs import Failure, Row, RowResult
from worker.wire.calls import Asked, read_call, write_answer
from worker.wire.checks import parse_object
from worker.wire.openai_calls import read_openai_call, shape_of, write_openai_answer
from worker.wire.results import failure_in

Answering = Callable[[str, Sequence[Row], float], Awaitable[list[RowResult]]]
"""`RowRunner.answer`."""

STATUSES = {
    "model_not_found": 404,
    "adapter_not_found": 424,
    "adapter_invalid": 424,
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
    ) -> None:
        """`base_models` are the names by which a request may call the base model, the first in answers.

        `is_workflow` tells what else OpenAI's `model` may name, beside adapters.
        """
        self._is_workflow = is_workflow
        self._answering = answering
        self._limits = limits
        self._base_models = base_models
        self.num_rows = 0
        """At work."""

    async def answer(self, call: Call) -> tuple[bytes, list[str]]:
        """JSON, and of each row `completed` or its error's code. Raises Refused and EngineFailed."""
        try:
            # Reading a large body takes a while, and others are to be answered.
            asked = await asyncio.to_thread(self._read, call)
        except InvalidMessage as error:
            raise Refused(400, _sentence(error)) from error
        results = await self._run(call, asked)
        failures = [failure_in(result) for result in results]
        if asked.is_single and failures[0] is not None:
            raise _refusal(failures[0], is_openai=asked.is_openai)
        body = await asyncio.to_thread(self._write, call, asked, results)
        return body, [failure.code if failure else "completed" for failure in failures]

    def _read(self, call: Call) -> Asked:
        body, names = _body(call), self._base_models
        shape = call.shape or shape_of(body)
        if shape is None:
            return read_call(
                body,
                max_rows=self._limits.max_rows,
                adapter=call.adapter,
                base_models=names,
                workflow=call.workflow,
            )
        workflow, model = call.workflow, body.get("model")
        if isinstance(model, str) and (workflow is None or call.is_plain):
            workflow = model if self._is_workflow(model) else None
        row = read_openai_call(
            body, shape, call_id=call.id, adapter=call.adapter, base_models=names, workflow=workflow
        )
        return Asked((row,), is_single=True, is_openai=True)

    def _write(self, call: Call, asked: Asked, results: Sequence[RowResult]) -> bytes:
        if not asked.is_openai:
            return write_answer(asked, results)
        created, base_model = int(time.time()), self._base_models[0]
        return write_openai_answer(results[0], call_id=call.id, created=created, base_model=base_model)

    async def _run(self, call: Call, asked: Asked) -> list[RowResult]:
        rows = len(asked.rows)
        if self.num_rows + rows > self._limits.max_rows:
            at_work = f"{self.num_rows} rows of calls are at work, and there may be {self._limits.max_rows}"
            raise Refused(503, f"The worker is busy: {at_work}", headers={"Retry-After": "1"})
        self.num_rows += rows
        try:
            return await self._answering(call.id, asked.rows, self._limits.timeout_seconds)
        finally:
            self.num_rows -= rows


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
