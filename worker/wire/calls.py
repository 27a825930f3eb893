"""The body of a call over HTTP, and its answer: a job's inline form, and DJL Serving's lists of texts.

A mistake in the shape of the whole raises InvalidMessage; a mistake in one row becomes that row's failure.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from worker.errors import InvalidMessage
from worker.jobs import Row, RowResult, Task
from worker.wire import rows
from worker.wire.checks import read_task, show, unknown
from worker.wire.results import encode, failure_in, response_of
from worker.wire.rows import read_rows
from worker.wire.streams import Lines, Streamed

FIELDS = rows.FIELDS | {"task", "stream"}


class Asked(msgspec.Struct, frozen=True):
    """What a body asks for."""

    rows: tuple[Row, ...]
    is_single: bool
    """Whether `inputs` was one text: then so is the answer."""
    is_openai: bool = False
    """Whether the body is one of OpenAI's API."""
    stream: Streamed | None = None
    """How the answer is spelled, where it is wanted piece by piece. Then it is to one row."""


def read_call(
    body: dict[str, Any],
    *,
    max_rows: int,
    adapter: str | None = None,
    base_models: Collection[str] | None = None,
    workflow: str | None = None,
    keeps_raw: bool = False,
) -> Asked:
    """The rows of a call. `adapter`, unless None, wins over what the body says; "" is the base model.

    With a `workflow` no row may name an adapter. `keeps_raw` is as for `read_rows`.
    """
    stranger = unknown(body, FIELDS)
    if stranger is not None:
        raise InvalidMessage(f"field {stranger}")
    task, is_single = read_task(body.get("task")), isinstance(body.get("inputs"), str)
    streams = read_stream(body)
    if streams and (task is not Task.GENERATE or not is_single):
        raise InvalidMessage("stream is true; that is for inputs of one text, to be gone on with")
    try:
        read = read_rows(
            body,
            max_rows=max_rows,
            adapter=adapter,
            task=task,
            base_models=base_models,
            workflow=workflow,
            keeps_raw=keeps_raw,
        )
    except RecursionError as error:
        raise InvalidMessage("the body is nested too deeply") from error
    if not streams:
        return Asked(read, is_single)
    (row,) = read
    row = replace(row, params=replace(row.params, details=True))  # which a stream tells in any case
    return Asked((row,), is_single, stream=Lines())


def read_stream(body: Mapping[str, Any]) -> bool:
    """Whether the answer is wanted piece by piece. Raises InvalidMessage."""
    said = body.get("stream")
    if said is not None and not isinstance(said, bool):
        raise InvalidMessage(f"stream is {show(said)}; it must be true or false")
    return bool(said)


def write_answer(asked: Asked, results: Sequence[RowResult]) -> bytes:
    """JSON: an element for each row, by itself where one text was asked for. A failed row's is its error."""
    elements = [_element(result) for result in results]
    return encode(elements[0] if asked.is_single else elements) + b"\n"


def _element(result: RowResult) -> dict[str, Any]:
    failure = failure_in(result)
    if failure is not None:
        return {"error": failure}
    return response_of(result)
