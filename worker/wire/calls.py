"""The body of a call over HTTP, and its answer: a job's inline form, and DJL Serving's lists of texts.

A mistake in the shape of the whole raises InvalidMessage; a mistake in one row becomes that row's failure.
"""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from worker.errors import InvalidMessage
from worker.jobs import Row, RowResult
from worker.wire import rows
from worker.wire.checks import read_task, show, unknown
from worker.wire.results import encode, failure_in, response_of
from worker.wire.rows import read_rows

FIELDS = rows.FIELDS | {"task", "stream"}


class Asked(msgspec.Struct, frozen=True):
    """What a body asks for."""

    rows: tuple[Row, ...]
    is_single: bool
    """Whether `inputs` was one text: then so is the answer."""
    is_openai: bool = False
    """Whether the body is one of OpenAI's API."""


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
    if body.get("stream") is not None and body["stream"] is not False:
        raise InvalidMessage(f"stream is {show(body['stream'])}; answers are not streamed: it must be false")
    task = read_task(body.get("task"))
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
    return Asked(read, isinstance(body.get("inputs"), str))


def write_answer(asked: Asked, results: Sequence[RowResult]) -> bytes:
    """JSON: an element for each row, by itself where one text was asked for. A failed row's is its error."""
    elements = [_element(result) for result in results]
    return encode(elements[0] if asked.is_single else elements) + b"\n"


def _element(result: RowResult) -> dict[str, Any]:
    failure = failure_in(result)
    if failure is not None:
        return {"error": failure}
    return response_of(result) if result.response is None else result.response
