"""The rows of a job, each through a custom handler to its result: as `delivery.rows` for the engine."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec

from worker.custom.adapters import HandlerAdapters
from worker.custom.answers import Answer
from worker.custom.handler import CustomHandler
from worker.custom.messages import Content
from worker.delivery.flow import FlowControl
from worker.delivery.row_runner import Hold, RowRunner
from worker.errors import (
    AdapterInvalid,
    AdapterNotFound,
    HandlerDied,
    HandlerRefusedRow,
    InvalidLine,
    OutOfMemory,
    RowError,
)
from worker.jobs import FinishReason, Row, RowResult, SamplingParams, Task
from worker.wire.checks import failure_of
from worker.wire.native import ADAPTER_HEADER
from worker.workflows.chain import no_workflow, run_chain
from worker.workflows.definition import Workflow

_DEFAULTS = SamplingParams()
_WIRE_NAMES = {"prompt_log_probs": "decoder_input_details"}
_OUT_OF_MEMORY = 507


class HandlerRows(RowRunner):
    """Runs rows of many jobs at once, each as one request to the handler.

    A request is what `POST /invocations` would be for the row alone: a body `{"inputs", "parameters"}` in
    JSON. Its adapter is named in all three ways that handlers look for: `adapters` in the body, `adapter` in
    the content, and the header. `adapters` None refuses rows that name one.
    """

    def __init__(
        self,
        handler: CustomHandler,
        adapters: HandlerAdapters | None,
        flow: FlowControl,
        *,
        workflow: Callable[[str], Workflow] = no_workflow,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(flow, clock)
        self._handler = handler
        self._known = adapters
        self._workflow = workflow

    async def _run(self, hold: Hold, row: Row) -> RowResult:
        if row.failure is not None:
            return RowResult(row=row, failure=row.failure)
        if row.workflow is not None:
            try:
                workflow = self._workflow(row.workflow)
            except RowError as exc:
                return RowResult(row=row, failure=failure_of(exc))
            return await run_chain(workflow, row, functools.partial(self._run, hold))
        version = None if self._known is None else self._known.version(row.adapter or "")
        try:
            self._refuse_late(hold)
            answer, body = await self._answer(row)
            return RowResult(
                row=row,
                adapter_version=version,
                text=text_of(answer, body),
                finish_reason=FinishReason.EOS_TOKEN,
            )
        except RowError as exc:
            return RowResult(row=row, adapter_version=version, failure=failure_of(exc))

    async def _answer(self, row: Row) -> tuple[Answer, bytes]:
        if row.adapter is not None and self._known is not None:
            trouble = self._known.trouble(row.adapter)
            if trouble is not None:
                raise AdapterInvalid(f"Adapter {row.adapter} is invalid: {trouble}")
        if row.adapter is not None and self._known is None:
            raise AdapterNotFound(f"Adapter {row.adapter} cannot be used: LoRA is not enabled")
        try:
            answer = await self._handler.call(self._handler.function, *request_of(row), urgent=False)
            return answer, await answer.read()
        except HandlerDied as error:
            raise HandlerRefusedRow(str(error)) from error


def request_of(row: Row) -> tuple[dict[str, str], Content]:
    """Properties and content of the request that a row is. Raises InvalidLine for one to be scored."""
    if row.task is not Task.GENERATE:
        raise InvalidLine("the job's task is score, and a custom handler gives no scores")
    body: dict[str, Any] = {}
    if row.messages is not None:
        body["messages"] = msgspec.to_builtins(row.messages)
    else:
        body["inputs"] = row.text if row.tokens is None else list(row.tokens)
    parameters = _parameters(row)
    if parameters:
        body["parameters"] = parameters
    properties, content = {"content-type": "application/json"}, []
    if row.adapter is not None:
        body["adapters"] = row.adapter
        properties[ADAPTER_HEADER] = row.adapter
        content.append(("adapter", row.adapter.encode()))
    return properties, (*content, ("data", msgspec.json.encode(body)))


def text_of(answer: Answer, body: bytes) -> str:
    """The `generated_text` that an answer is.

    Of `{"generated_text": "..."}`, or a list of one such, it is that text; any other text, JSON too, is it
    as it stands. Raises RowError for a failure, and HandlerRefusedRow for what is no text.
    """
    if answer.is_failure:
        raise (OutOfMemory if answer.status == _OUT_OF_MEMORY else HandlerRefusedRow)(answer.reason)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        said = f"the handler's answer has {len(body)} bytes that are no text"
        raise HandlerRefusedRow(f"{said} ({answer.kind or 'without a content type'})") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    generated = value.get("generated_text") if isinstance(value, dict) else None
    return generated if isinstance(generated, str) else text


def _parameters(row: Row) -> dict[str, Any]:
    """Those that were said; of a row of another format, by their names here, what is not our default."""
    if row.origin is None:
        return {name: value for name, value in row.said.items() if value is not None}
    said: dict[str, Any] = {}
    for name in SamplingParams.__struct_fields__:
        value = getattr(row.params, name)
        if value != getattr(_DEFAULTS, name):
            said[_WIRE_NAMES.get(name, name)] = value
    if "logit_bias" in said:
        said["logit_bias"] = {str(token): bias for token, bias in row.params.logit_bias}
    return said
