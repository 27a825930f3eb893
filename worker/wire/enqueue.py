"""The sender's side: a job -> the body of its SQS message."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker.errors import InvalidMessage
from worker.jobs import Output

MAX_BODY_BYTES = 1_048_576
"""That SQS takes, message attributes included."""


def encode_job(
    inputs: str | Sequence[str | Mapping[str, Any]] | None = None,
    *,
    id: str | None = None,  # noqa: A002 - the field's name
    input: Mapping[str, Any] | None = None,  # noqa: A002 - likewise
    adapters: str | Sequence[str | None] | None = None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    model: str | None = None,
    task: str | None = None,
    ids: Sequence[str] | None = None,
    output: Output | None = None,
    ttl_seconds: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write the body that `native.decode` reads; what is None is left out.

    Raises InvalidMessage when it cannot be sent: above SQS's limit, or not writable as UTF-8 JSON. What the
    fields mean is checked by `decode` alone.
    """
    return encode_fields(
        id=id,
        inputs=inputs,
        input=input,
        adapters=adapters,
        parameters=parameters,
        model=model,
        task=task,
        ids=ids,
        output=None if output is None else {"uri": output.uri, "format": output.format},
        ttl_seconds=ttl_seconds,
        metadata=metadata,
    )


def encode_fields(**fields: Any) -> str:
    """A body with these fields; those that are None are left out. Raises as `encode_job`."""
    said = {"version": 1} | {name: value for name, value in fields.items() if value is not None}
    try:
        body = json.dumps(said, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage(f"the job cannot be written as JSON: {error}") from error
    if len(body) > MAX_BODY_BYTES:
        raise InvalidMessage(f"the message would have {len(body)} bytes; it may have {MAX_BODY_BYTES}")
    return body.decode()
